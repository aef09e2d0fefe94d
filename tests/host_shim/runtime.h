// What device code calls of the runner (runner.cpp): threads as fibers, barriers, warps, shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>

#include "types.h"

namespace dlkern_shim {

constexpr unsigned kWarp = 32, kDeposit = 64;

// What the lanes of a warp brought to one collective: `present` has a bit for each lane that took part.
struct Snapshot {
  unsigned present = 0;
  unsigned char data[kWarp][kDeposit] = {};

  template <typename T>
  T get(unsigned lane) const {
    T value;
    std::memcpy(&value, data[lane], sizeof(T));
    return value;
  }
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t shared;
  const char* schedule;  // "forward", "reverse" or "random N"
};

// One schedule of a whole grid. The order of blocks and, at each switch, of threads follows `launch.schedule`.
void run_grid(const Launch& launch, const std::function<void()>& body);

// Ends the process with the kernel, block and thread that run, and the message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for the whole block; the number of threads whose `predicate` was not 0.
unsigned block_barrier(const char* what, bool predicate, const char* file, int line);
// Waits for the lanes of `mask`; what each of them brought. T is copied byte by byte.
std::shared_ptr<const Snapshot> warp_collective(const char* what, unsigned mask, const void* value, size_t size,
                                                const char* file, int line);
unsigned lane_index();

// A __shared__ variable is reached: the first thread of a block to do so fills it with the schedule's poison.
void shared_variable(void* address, size_t size);
// extern __shared__: the launch's bytes, poisoned before each block.
void* dynamic_shared();

// Memory that belongs to a buffer of the job, so that a report of AddressSanitizer can name it.
void name_memory(int buffer, const void* address, size_t size);
void forget_memory();

}  // namespace dlkern_shim

inline uint3 threadIdx, blockIdx;  // set whenever a fiber goes on
inline dim3 blockDim, gridDim;
