// Measure the latency of an exported model in C++, for `python -m real_world.benchmark inference`.
//
//   latency PACKAGE.pt2 BATCH_SIZE CALLS
//
// Prints "warm", and then for every line of its input the seconds per call, over CALLS calls.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: latency PACKAGE.pt2 BATCH_SIZE CALLS\n");
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  const int64_t in_features = std::stoll(package.get_metadata().at("in_features"));
  const int64_t batch_size = std::stoll(argv[2]);
  const int64_t calls = std::stoll(argv[3]);
  at::set_num_threads(1);  // as in the measurements of Python
  const c10::InferenceMode inference_mode;
  const at::Tensor X = at::randn({batch_size, in_features});
  package.run({X});
  std::puts("warm");
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t call = 0; call < calls; ++call) package.run({X});
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%.9g\n", seconds.count() / static_cast<double>(calls));
    std::fflush(stdout);
  }
}
