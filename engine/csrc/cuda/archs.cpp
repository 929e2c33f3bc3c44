// What the library was compiled for, to be read in the file before it is loaded (extension.py).
extern "C" __attribute__((visibility("default"), used)) const char lorax_cuda_archs[] =
    "lorax_cuda_archs=" LORAX_CUDA_ARCHS;
