// Load an exported model, or say why it cannot be loaded.

#pragma once

#include <ATen/cpu/Utils.h>
#include <sys/statvfs.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <unistd.h>

#include <cctype>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>

#include "checksums.h"

using Package = torch::inductor::AOTIModelPackageLoader;

// Throws if the processor lacks one of the instruction sets in `names`, such as "AVX512 AMX_TILE".
inline void check_processor(const std::string& names) {
  const auto capabilities = at::cpu::get_cpu_capabilities();
  std::istringstream stream(names);
  for (std::string name; stream >> name;) {
    for (char& c : name) c = static_cast<char>(std::tolower(c));
    const auto found = capabilities.find(name == "avx512" ? "avx512_f" : name);
    if (found != capabilities.end() && !found->second.toBool()) {
      throw std::runtime_error("it needs a processor with " + names);
    }
  }
}

// Returns the first line of an exception's message, without the stack trace that follows.
inline std::string first_line(const std::exception& error) {
  const std::string message = error.what();
  return message.substr(0, message.find('\n'));
}

// Returns why a package that was unpacked in `folder` could not be loaded.
inline std::string load_problem(const std::exception& error, const std::filesystem::path& folder,
                                const std::string& package) {
  const std::string parent = folder.parent_path();
  struct statvfs disk;
  if (statvfs(folder.c_str(), &disk) != 0) return first_line(error);
#ifdef ST_NOEXEC
  if (disk.f_flag & ST_NOEXEC) return parent + " is mounted noexec, set TMPDIR to another folder";
#endif
  const auto free_bytes = static_cast<uintmax_t>(disk.f_bavail) * disk.f_frsize;
  const bool full = free_bytes < std::filesystem::file_size(package);
  return full ? parent + " is full, set TMPDIR to another folder" : first_line(error);
}

// Loads a package, which the loader unpacks in $TMPDIR. The files are deleted as soon as the code
// is in memory; until then, the signals that end a process are blocked: no file is left behind.
inline std::unique_ptr<Package> load_package(const std::string& path) {
  const auto status = std::filesystem::status(path);
  if (!exists(status)) throw std::runtime_error("no such file");
  if (is_directory(status)) throw std::runtime_error("is a folder");
  if (!is_regular_file(status)) throw std::runtime_error("not a regular file");
  verify_checksums(path);
  sigset_t signals, old_signals;
  sigemptyset(&signals);
  for (const int signal : {SIGHUP, SIGINT, SIGTERM}) sigaddset(&signals, signal);
  sigprocmask(SIG_BLOCK, &signals, &old_signals);

  std::string folder = std::filesystem::temp_directory_path() / "predict-XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) {
    throw std::runtime_error("cannot create " + folder + ": " + std::strerror(errno));
  }
  setenv("TMPDIR", folder.c_str(), 1);
  std::unique_ptr<Package> package;
  std::string problem;
  try {
    const auto metadata = Package::load_metadata_from_package(path, "model");
    if (metadata.count("in_features") == 0) throw std::runtime_error("not a package of the lesson");
    check_processor(metadata.at("AOTI_CPU_ISA"));
    package = std::make_unique<Package>(path);
  } catch (const std::exception& error) {
    problem = load_problem(error, folder, path);
  }
  std::error_code ignored;
  std::filesystem::remove_all(folder, ignored);
  sigprocmask(SIG_SETMASK, &old_signals, nullptr);
  if (!problem.empty()) throw std::runtime_error(problem);
  return package;
}
