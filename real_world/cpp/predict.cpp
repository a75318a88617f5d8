// The lesson's network answering from C++: no Python in the process.
//
//   predict PACKAGE.pt2 < rows.csv
//
// Reads rows of features as CSV, one sample a line, from standard input. Writes "line,class,p0,p1,..."
// for each: the line that the sample stood in, the class, and the probability of every class.
// What has arrived is answered at once, so it works in a pipe, and memory does not grow with the input.
//
// A bad row gets a sentence with its line number on standard error, and no answer; the others do.
// Exit status: 0, 1 where a row was bad or the answers could not be written, 2 where it could not start.
//
// The package holds machine code, made by `python -m real_world.deploy`. Loading one runs it: load none
// that you did not build.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace {

constexpr size_t kReadSize = 1 << 16;     // bytes a read: some 2,000 rows of four features
constexpr size_t kLongestLine = 1 << 16;  // a file without line ends must not fill the memory
constexpr double kLargestValue = 1e30;    // the sums of much larger ones overflow float32

std::string_view trim(std::string_view text) {
  constexpr std::string_view blank = " \t\r";
  const size_t first = text.find_first_not_of(blank);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(blank) - first + 1);
}

volatile std::sig_atomic_t stopped_by = 0;

// A field as a message shows it: short, and without what could steer a terminal.
std::string shown(std::string_view field) {
  std::string text(field.substr(0, 40));
  std::replace_if(text.begin(), text.end(), [](unsigned char c) { return !std::isprint(c); }, '?');
  return text;
}

class Predictor {
 public:
  // Throws std::runtime_error for a file that is no package, or no package of the lesson's network.
  explicit Predictor(const std::string& path) : features_(features(path)), package_(path) {}

  // Takes one line; appends its features to the batch, or says on standard error what is wrong.
  void take(std::string_view line) {
    ++line_;
    line = trim(line);
    const size_t before = batch_.size();
    if (const auto complaint = parse(line)) {
      batch_.resize(before);
      complain(line_, *complaint);
    } else {
      lines_.push_back(line_);
    }
  }

  // Tensor batch -> network -> logits -> probabilities -> answers, for the rows taken since the last.
  void answer() {
    if (lines_.empty()) return;
    const auto rows = static_cast<int64_t>(lines_.size());
    const at::Tensor features = torch::from_blob(batch_.data(), {rows, features_});
    const at::Tensor logits = package_.run({features}).at(0);
    const at::Tensor probabilities = logits.softmax(1).contiguous();
    const at::Tensor classes = probabilities.argmax(1).contiguous();
    const int64_t columns = probabilities.size(1);
    const float* probability = probabilities.const_data_ptr<float>();
    const int64_t* label = classes.const_data_ptr<int64_t>();
    output_.clear();
    for (int64_t row = 0; row < rows; ++row) {
      if (!std::isfinite(probability[0])) {  // then none of its row is
        complain(lines_[row], "has values so large that the answer is no number");
        probability += columns;
        continue;
      }
      append(lines_[row]);
      output_ += ',';
      append(label[row]);
      for (int64_t column = 0; column < columns; ++column) {
        output_ += ',';
        append(*probability++);  // the shortest decimal that reads back as this float
      }
      output_ += '\n';
    }
    std::fwrite(output_.data(), 1, output_.size(), stdout);
    std::fflush(stdout);
    batch_.clear();
    lines_.clear();
  }

  bool any_bad() const { return any_bad_; }

 private:
  // The package's metadata, which is read without running its code, says how wide a row is.
  static int64_t features(const std::string& path) {
    const auto metadata =
        torch::inductor::AOTIModelPackageLoader::load_metadata_from_package(path, "model");
    const auto found = metadata.find("in_features");
    if (found == metadata.end()) throw std::runtime_error("it does not say its in_features");
    return std::stoll(found->second);
  }

  std::optional<std::string> parse(std::string_view line) {
    if (line.empty()) return "is empty";
    if (line.size() > kLongestLine) {
      return "is longer than " + std::to_string(kLongestLine) + " bytes";
    }
    int64_t count = 0;
    for (bool more = true; more; ++count) {
      const size_t comma = line.find(',');
      more = comma != std::string_view::npos;
      std::string_view field = trim(line.substr(0, comma));
      line.remove_prefix(more ? comma + 1 : line.size());
      if (field.size() > 1 && field[0] == '+' && field[1] != '-') field.remove_prefix(1);
      double value = 0;
      // Unlike strtod and streams, from_chars depends on no locale and allocates nothing.
      const auto [end, error] = std::from_chars(field.begin(), field.end(), value);
      if (error == std::errc::invalid_argument || end != field.end()) {
        return "has '" + shown(field) + "', which is not a number";
      }
      if (error == std::errc::result_out_of_range) {  // so small that it is 0, or so large
        value = std::strtod(std::string(field).c_str(), nullptr);
      }
      if (!(std::abs(value) <= kLargestValue)) {  // nan is not, either
        return "has " + shown(field) + ", the network takes values up to 1e30";
      }
      batch_.push_back(static_cast<float>(value));
    }
    if (count == features_) return std::nullopt;
    return "has " + std::to_string(count) + " values, the network takes " +
           std::to_string(features_);
  }

  template <typename Number>
  void append(Number value) {
    std::array<char, 32> text;
    const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), value);
    output_.append(text.data(), end);
  }

  void complain(int64_t line, const std::string& complaint) {
    any_bad_ = true;
    std::fprintf(stderr, "predict: line %lld %s\n", static_cast<long long>(line),
                 complaint.c_str());
  }

  int64_t features_;
  torch::inductor::AOTIModelPackageLoader package_;
  int64_t line_ = 0;
  bool any_bad_ = false;
  std::vector<float> batch_;    // the features of the rows taken, row after row
  std::vector<int64_t> lines_;  // the line of each
  std::string output_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 || std::string_view(argv[1]).starts_with("--")) {
    std::fprintf(stderr, "predict: usage: predict PACKAGE.pt2 < rows.csv\n");
    return 2;
  }
  const std::string path = argv[1];
  std::error_code unreadable;
  if (!std::filesystem::is_regular_file(path, unreadable)) {
    std::fprintf(stderr, "predict: there is no file %s; 'python -m real_world.deploy' makes one\n",
                 path.c_str());
    return 2;
  }
  std::optional<Predictor> predictor;
  try {
    predictor.emplace(path);
  } catch (const std::exception&) {  // its message is a stack trace
    std::fprintf(stderr,
                 "predict: %s is no AOTInductor package of the lesson's network for this machine; "
                 "'python -m real_world.deploy' makes one\n",
                 path.c_str());
    return 2;
  }

  // To die of a signal would leave the unpacked package behind.
  std::signal(SIGPIPE, SIG_IGN);
  struct sigaction action = {};
  action.sa_handler = [](int signal) { stopped_by = signal; };  // and read() is interrupted
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  at::set_num_threads(1);  // a few rows are done before a second thread has woken up
  const c10::InferenceMode no_autograd;
  std::string pending;  // the line whose end has not arrived yet
  bool skipping = false;  // through a line that is too long
  std::array<char, kReadSize> buffer;
  for (;;) {
    const ssize_t count = read(STDIN_FILENO, buffer.data(), buffer.size());
    if (stopped_by != 0) return 128 + stopped_by;
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      std::fprintf(stderr, "predict: cannot read the input: %s\n", std::strerror(errno));
      return 2;
    }
    if (count == 0) break;
    std::string_view arrived(buffer.data(), static_cast<size_t>(count));
    for (size_t end; (end = arrived.find('\n')) != std::string_view::npos;) {
      if (!skipping) predictor->take(pending.append(arrived.substr(0, end)));
      pending.clear();
      skipping = false;
      arrived.remove_prefix(end + 1);
    }
    if (!skipping) pending += arrived;
    if (pending.size() > kLongestLine) {
      predictor->take(pending);
      pending.clear();
      skipping = true;
    }
    predictor->answer();
    if (std::ferror(stdout)) break;
  }
  if (!std::ferror(stdout) && !pending.empty()) predictor->take(pending);
  predictor->answer();
  if (std::ferror(stdout)) {
    if (errno == EPIPE) return 128 + SIGPIPE;  // whoever reads the answers, `head` say, has enough
    std::fprintf(stderr, "predict: cannot write the answers: %s\n", std::strerror(errno));
    return 1;
  }
  return predictor->any_bad() ? 1 : 0;
}
