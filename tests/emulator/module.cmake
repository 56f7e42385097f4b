# _emulated: csrc/cuda compiled by the host's compiler against the emulator, with the door of the extension.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
file(GLOB cuda_files CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/cuda/*.cu)
list(FILTER cuda_files EXCLUDE REGEX "/device.cu$")  # the driver's questions: there is no driver
set_source_files_properties(${cuda_files} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-xc++;-Wno-unknown-pragmas")
file(GLOB emulator CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/tests/emulator/*.cpp)
pybind11_add_module(_emulated NO_EXTRAS ${cuda_files} ${emulator})
target_include_directories(_emulated PRIVATE csrc tests/emulator)
target_compile_definitions(_emulated PRIVATE TOKENFLOW_EMULATED TOKENFLOW_ISA=cuda)
# Fused multiply-adds are library calls where the processor's own are not used; the bits are the same.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-march=native native)
target_compile_options(_emulated PRIVATE -O2 -ffp-contract=off -Wall $<$<BOOL:${native}>:-march=native>)
