// What the extension asks CUDA's runtime beside launches.
#pragma once

extern "C" {
// 0 where the runtime that is linked here has a driver and a device, else CUDA's error code.
int dlkern_cuda_probe();
const char* dlkern_cuda_error_text(int code);
}
