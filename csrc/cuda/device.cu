#include "cuda/device.h"

#include "cuda/cuda_prelude.h"

int dlkern_cuda_probe() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  (void)cudaGetLastError();  // what was asked is answered: the next launch does not report it
  return (int)(error == cudaSuccess && devices == 0 ? cudaErrorNoDevice : error);
}

const char* dlkern_cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
