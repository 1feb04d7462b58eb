# dge::torch: PyTorch's include folder and libtorch_cpu, found without importing torch.
#
# find_package(Torch) is not used: beside a CUDA build of torch it insists on a complete CUDA toolkit and sets
# its own architectures. The stable ABI needs neither.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE DGE_TORCH_ROOT
  OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT DGE_TORCH_ROOT)
  message(FATAL_ERROR "dge-kernels needs PyTorch's headers, and ${Python_EXECUTABLE} has no torch. "
                      "Install torch >= 2.10 there, or build with build isolation (pip's default).")
endif()

file(STRINGS "${DGE_TORCH_ROOT}/version.py" version_line REGEX "^__version__ *(: *str *)?=")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" DGE_TORCH_HEADERS "${version_line}")
if(DGE_TORCH_HEADERS VERSION_LESS 2.10)
  message(FATAL_ERROR "dge-kernels needs the headers of torch >= 2.10, found ${DGE_TORCH_HEADERS} in ${DGE_TORCH_ROOT}.")
endif()

# The oldest torch that the binaries load into, as torch encodes versions: one byte major, one byte minor.
set(DGE_TORCH_TARGET 2.10)
string(REPLACE "." ";" target_parts ${DGE_TORCH_TARGET})
list(GET target_parts 0 target_major)
list(GET target_parts 1 target_minor)
math(EXPR target_code "(${target_major} << 56) | (${target_minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)

add_library(dge_torch INTERFACE)
add_library(dge::torch ALIAS dge_torch)
target_include_directories(dge_torch SYSTEM INTERFACE "${DGE_TORCH_ROOT}/include")
# The version is in every command line, so that a build folder that outlives a torch is built anew with the next: a
# package's files may be older than what was built with those before them.
target_compile_definitions(dge_torch INTERFACE "TORCH_TARGET_VERSION=${target_code}ULL"
                                               "DGE_TORCH_HEADERS=\"${DGE_TORCH_HEADERS}\"")
target_link_libraries(dge_torch INTERFACE "${DGE_TORCH_ROOT}/lib/libtorch_cpu.so")
