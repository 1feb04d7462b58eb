// Build facts for Python; no tensors, so no torch.
#include <pybind11/pybind11.h>

#include <string>

PYBIND11_MODULE(_build, m) {
  m.doc() = "What this copy of dge-kernels was built from and for.";
  m.attr("version") = DGE_VERSION;
  m.attr("cuda_version") = std::string(DGE_CUDA_VERSION).empty() ? pybind11::object(pybind11::none())
                                                                 : pybind11::object(pybind11::str(DGE_CUDA_VERSION));
  m.attr("cuda_architectures") = DGE_CUDA_ARCHITECTURES_BUILT;
  m.attr("compiler") = DGE_COMPILER;
  m.attr("torch_headers") = DGE_TORCH_HEADERS;
  m.attr("torch_target") = DGE_TORCH_TARGET;
}
