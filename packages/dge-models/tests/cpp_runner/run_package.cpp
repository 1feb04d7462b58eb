// Runs an AOTInductor package without Python: run_package PACKAGE INPUT OUTPUT, files of torch.save's tensors' bytes.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <ATen/ops/empty.h>

#include <cstdlib>
#include <fstream>
#include <iostream>
#include <vector>

int main(int count, char** arguments) {
  if (count < 5) {
    std::cerr << "usage: run_package PACKAGE INPUT OUTPUT SIZE...\n";
    return 2;
  }
  std::vector<int64_t> shape;
  for (int index = 4; index < count; ++index) shape.push_back(std::atoll(arguments[index]));
  at::Tensor images = at::empty(shape, at::kFloat);
  std::ifstream input(arguments[2], std::ios::binary);
  if (!input.read(static_cast<char*>(images.data_ptr()), static_cast<std::streamsize>(images.nbytes()))) {
    std::cerr << "cannot read " << arguments[2] << "\n";
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  at::Tensor output = loader.run({images}).at(0).contiguous();
  std::ofstream file(arguments[3], std::ios::binary);
  file.write(static_cast<const char*>(output.data_ptr()), static_cast<std::streamsize>(output.nbytes()));
  return file ? 0 : 1;
}
