// Classify samples with the exported model, in C++, without Python.
//
//   predict PACKAGE.pt2 < samples.csv
//
// Reads CSV from standard input, one sample per line, and writes "line,class,p0,p1,..." for each:
// the line number, the class and the probability of every class. An invalid line gets a message on
// standard error and no answer. Lines are answered as they arrive, in batches, so that the program
// works in a pipe, and its memory does not grow with the input.
//
// Exit status: 0; 1 if a line was invalid or an answer cannot be written; 2 if it cannot start.
//
// A package contains machine code, which runs when it is loaded: load only packages that you trust.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <unistd.h>

#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "package.h"

namespace {

constexpr size_t kReadSize = 1 << 16;  // bytes: some 2,000 samples of four features
constexpr size_t kMaxLine = 1 << 16;   // a file without line ends must not fill the memory

std::string_view trim(std::string_view text) {
  const size_t first = text.find_first_not_of(" \t\r");
  if (first == std::string_view::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\r") - first + 1);
}

// The start of a text, without what is not printable, such as a terminal's escape sequences.
std::string printable(std::string_view text, size_t max_size = 40) {
  std::string result(text.substr(0, max_size));
  for (char& c : result) {
    if (!std::isprint(static_cast<unsigned char>(c))) c = '?';
  }
  return result;
}

template <typename Number>
void append(std::string& text, Number value) {
  std::array<char, 32> digits;  // the shortest that read back as the same number
  const auto result = std::to_chars(digits.data(), digits.data() + digits.size(), value);
  text.append(digits.data(), result.ptr);
}

class Predictor {
 public:
  explicit Predictor(const char* path)
      : package_(load_package(path)),
        in_features_(std::stoul(package_->get_metadata().at("in_features"))) {
    const at::Tensor X = at::zeros({1, static_cast<int64_t>(in_features_)});
    const at::Tensor logits = package_->run({X}).at(0);
    if (logits.dim() != 2 || logits.scalar_type() != at::kFloat) {
      throw std::runtime_error("the model does not return logits");
    }
  }

  // Adds the sample in a line to the batch, or reports what is wrong with it.
  void add(std::string_view line) {
    ++line_number_;
    if (line_number_ == 1 && line.starts_with("\xEF\xBB\xBF")) line.remove_prefix(3);  // UTF-8 BOM
    const size_t size = features_.size();
    const std::string problem = parse(line);
    if (problem.empty()) {
      line_numbers_.push_back(line_number_);
    } else {
      features_.resize(size);
      report(line_number_, problem);
    }
  }

  // Classifies the batch, writes the answers and starts a new batch.
  void answer() {
    if (line_numbers_.empty()) return;
    const auto batch = static_cast<int64_t>(line_numbers_.size());
    const auto in_features = static_cast<int64_t>(in_features_);
    const at::Tensor X = at::from_blob(features_.data(), {batch, in_features});
    const at::Tensor logits = package_->run({X}).at(0);  // (batch, num_classes)
    const at::Tensor probabilities = logits.softmax(1).contiguous();
    const at::Tensor classes = probabilities.argmax(1);
    const auto label = classes.accessor<int64_t, 1>();
    const auto probability = probabilities.accessor<float, 2>();
    std::string answers;
    for (int64_t i = 0; i < batch; ++i) {
      if (!std::isfinite(probability[i][0])) {  // a softmax has one sum for all classes
        report(line_numbers_[i], "has values so large that the result is not finite");
        continue;
      }
      append(answers, line_numbers_[i]);
      answers += ',';
      append(answers, label[i]);
      for (int64_t j = 0; j < probability.size(1); ++j) {
        answers += ',';
        append(answers, probability[i][j]);
      }
      answers += '\n';
    }
    std::fwrite(answers.data(), 1, answers.size(), stdout);
    std::fflush(stdout);
    features_.clear();
    line_numbers_.clear();
  }

  bool all_valid() const { return all_valid_; }

 private:
  // Appends the features in a line to the batch; returns what is wrong with the line, or "".
  std::string parse(std::string_view line) {
    for (size_t count = 1;; ++count) {
      const size_t comma = line.find(',');
      std::string_view field = trim(line.substr(0, comma));
      if (field.starts_with('+') && !field.starts_with("+-")) field.remove_prefix(1);  // from_chars knows no plus sign
      const char* field_end = field.data() + field.size();
      double value;
      const auto [end, error] = std::from_chars(field.data(), field_end, value);
      if (error == std::errc::result_out_of_range) {
        value = std::strtod(std::string(field).c_str(), nullptr);  // 0, a tiny number or infinity
      }
      const bool valid = error != std::errc::invalid_argument && end == field_end;
      if (!valid || !std::isfinite(static_cast<float>(value))) {
        if (field.find(';') != std::string_view::npos) return "has semicolons, use commas";
        const char* hint = line_number_ == 1 ? " (the file must have no header)" : "";
        return "has '" + printable(field) + "', which is not a finite number" + hint;
      }
      features_.push_back(static_cast<float>(value));
      if (comma == std::string_view::npos) {
        if (count == in_features_) return "";
        return "has " + std::to_string(count) + " values, the model takes " +
               std::to_string(in_features_);
      }
      line.remove_prefix(comma + 1);
    }
  }

  void report(int64_t line_number, const std::string& problem) {
    all_valid_ = false;
    std::fprintf(stderr, "predict: line %lld %s\n", static_cast<long long>(line_number),
                 problem.c_str());
  }

  std::unique_ptr<Package> package_;
  size_t in_features_;
  int64_t line_number_ = 0;
  bool all_valid_ = true;
  std::vector<float> features_;        // of the batch, sample after sample
  std::vector<int64_t> line_numbers_;  // of each sample of the batch
};

// Classifies standard input; returns the exit status.
int classify_input(Predictor& predictor) {
  std::array<char, kReadSize> buffer;
  std::string input;  // what was read, without the lines that were answered
  ssize_t count;
  while ((count = read(STDIN_FILENO, buffer.data(), buffer.size())) > 0) {
    input.append(buffer.data(), static_cast<size_t>(count));
    size_t start = 0;
    for (size_t end; (end = input.find('\n', start)) != std::string::npos; start = end + 1) {
      predictor.add(std::string_view(input).substr(start, end - start));
    }
    input.erase(0, start);
    predictor.answer();
    if (std::ferror(stdout)) break;
    if (input.size() > kMaxLine) {
      std::fprintf(stderr, "predict: a line is longer than %zu bytes\n", kMaxLine);
      return 1;
    }
  }
  if (count == 0 && !input.empty()) predictor.add(input);  // the last line may have no end
  predictor.answer();
  if (count < 0 || std::ferror(stdout)) {
    const char* action = count < 0 ? "read the samples" : "write the answers";
    std::fprintf(stderr, "predict: cannot %s: %s\n", action, std::strerror(errno));
    return 1;
  }
  return predictor.all_valid() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: predict PACKAGE.pt2 < samples.csv\n");
    return 2;
  }
  at::set_num_threads(1);  // a batch is too small for more threads
  const c10::InferenceMode inference_mode;
  try {
    Predictor predictor(argv[1]);
    return classify_input(predictor);
  } catch (const std::exception& error) {
    const std::string problem = printable(first_line(error), 1000);  // may quote a damaged name
    std::fprintf(stderr, "predict: cannot use %s: %s\n", argv[1], problem.c_str());
    return 2;
  }
}
