// How long a call of an exported network takes without Python, for `python -m real_world.benchmark`.
//
//   latency PACKAGE.pt2 ROWS CALLS
//
// Prints "warm", and then for every line that comes in the seconds of a call, over CALLS of them.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <cstdio>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "latency: usage: latency PACKAGE.pt2 ROWS CALLS\n");
    return 2;
  }
  torch::inductor::AOTIModelPackageLoader package(argv[1]);
  const int64_t features = std::stoll(package.get_metadata().at("in_features"));
  const int64_t rows = std::stoll(argv[2]);
  const int64_t calls = std::stoll(argv[3]);
  at::set_num_threads(1);  // as the forms in Python have it
  const c10::InferenceMode no_autograd;
  const at::Tensor batch = torch::randn({rows, features});
  package.run({batch});
  std::puts("warm");
  std::fflush(stdout);
  for (std::string line; std::getline(std::cin, line);) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t call = 0; call < calls; ++call) package.run({batch});
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%.9g\n", seconds.count() / static_cast<double>(calls));
    std::fflush(stdout);
  }
}
