// Runs the blocks of a grid one after another, the threads of a block as fibers of one OS thread.
//
// A fiber runs until it waits at a barrier or a warp collective, or returns; then the ready fiber that comes first in
// the schedule's order goes on. Compiled without instrumentation, but linked with AddressSanitizer.
#include "runtime.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace dlkern_shim {
namespace {

constexpr size_t kStack = size_t(256) << 10, kGuard = 4096, kMaxShared = size_t(227) << 10;

enum class Order { kForward, kReverse, kRandom };
enum class State { kReady, kBarrier, kWarp, kDone };

// Where __builtin_setjmp was. After its first entry (makecontext) a fiber is left and entered by __builtin_longjmp,
// which costs no system call; unlike longjmp it is left alone by AddressSanitizer, which would take it for the end of
// frames.
struct Place {
  void* buffer[5];
};

struct Fiber {
  ucontext_t context;
  Place place;
  bool started = false;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  uint3 index{};
  unsigned linear = 0;
  State state = State::kDone;
  // where it waits
  const char* what = "";
  const char* file = "";
  int line = 0;
  bool predicate = false;
  unsigned mask = 0;
  size_t size = 0;
  unsigned char deposit[kDeposit];
  std::shared_ptr<Snapshot> snapshot;
};

struct Runner {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Place scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;

  Order order = Order::kForward;
  std::mt19937 random;
  std::vector<unsigned> rank, by_rank;  // a thread's place in the order, and back
  std::set<unsigned> ready;             // ranks
  unsigned barrier_count = 0, alive = 0;

  unsigned char poison = 0xff;
  void* dynamic = nullptr;
  std::map<void*, size_t> poisoned;  // __shared__ variables that this block has reached
};

Runner runner;

struct Named {
  int buffer;
  const char* address;
  size_t size;
};
std::vector<Named> named_memory;

// Stacks of fibers, kept for the next schedule: each lies behind a page that nobody may touch.
char* stack(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* memory =
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) fail("no memory for the stack of thread %zu", i);
    stacks.push_back(static_cast<char*>(memory) + kGuard);
  }
  return stacks[i];
}

std::string where(const Fiber& f) { return std::string(f.what) + " (" + f.file + ":" + std::to_string(f.line) + ")"; }

void print_context() {
  if (runner.launch == nullptr) return;
  const Launch& launch = *runner.launch;
  std::fprintf(stderr, "shim: kernel %s, schedule %s, block (%u, %u, %u)", launch.kernel, launch.schedule, blockIdx.x,
               blockIdx.y, blockIdx.z);
  if (runner.current) {
    const uint3 t = runner.current->index;
    std::fprintf(stderr, ", thread (%u, %u, %u)", t.x, t.y, t.z);
  }
  std::fprintf(stderr, "\n");
  if (!__asan_report_present()) return;
  const char* address = static_cast<const char*>(__asan_get_report_address());
  for (const Named& n : named_memory) {  // malloc's red zones are at least this wide
    if (address < n.address - 16 || address >= n.address + n.size + 16) continue;
    std::fprintf(stderr, "shim: near buffer %d, %td bytes from its start (it has %zu)\n", n.buffer, address - n.address,
                 n.size);
  }
}

// 0, 1, ... count - 1 in the schedule's order.
template <typename T>
std::vector<T> ordered(size_t count) {
  std::vector<T> all(count);
  std::iota(all.begin(), all.end(), T(0));
  if (runner.order == Order::kReverse) std::reverse(all.begin(), all.end());
  if (runner.order == Order::kRandom) std::shuffle(all.begin(), all.end(), runner.random);
  return all;
}

void order_threads() {
  const size_t threads = runner.fibers.size();
  runner.by_rank = ordered<unsigned>(threads);
  runner.rank.resize(threads);
  for (unsigned r = 0; r < threads; ++r) runner.rank[runner.by_rank[r]] = r;
}

// Poison has bytes of its own in each schedule, so that what reads it differs: as numbers of any type positive and not
// small (a NaN loses comparisons, and may go unseen), negative, or NaN.
void set_schedule(const std::string& name) {
  unsigned seed = 0;
  if (name == "forward") {
    runner.order = Order::kForward;
    runner.poison = 0x53;
  } else if (name == "reverse") {
    runner.order = Order::kReverse;
    runner.poison = 0x47;
  } else if (std::sscanf(name.c_str(), "random %u", &seed) == 1) {
    runner.order = Order::kRandom;
    runner.poison = seed % 2 ? 0xff : 0xd2;
    runner.random.seed(seed);
  } else {
    fail("no schedule '%s': forward, reverse and random N are there", name.c_str());
  }
}

void make_ready(Fiber& f) {
  f.state = State::kReady;
  runner.ready.insert(runner.rank[f.linear]);
}

[[noreturn]] __attribute__((noinline)) void jump(Place& place) { __builtin_longjmp(place.buffer, 1); }

[[noreturn]] __attribute__((noinline)) void enter(Fiber& f) {
  if (f.started) jump(f.place);
  f.started = true;
  setcontext(&f.context);
  fail("setcontext failed");
}

// From a fiber back to the scheduler; returns when the fiber goes on.
__attribute__((noinline)) void leave() {
  __sanitizer_start_switch_fiber(&runner.current->fake_stack, runner.scheduler_stack, runner.scheduler_stack_size);
  if (__builtin_setjmp(runner.current->place.buffer) == 0) jump(runner.scheduler);
  __sanitizer_finish_switch_fiber(runner.current->fake_stack, nullptr, nullptr);
}

__attribute__((noinline)) void resume(Fiber& f) {
  runner.current = &f;
  threadIdx = f.index;
  __sanitizer_start_switch_fiber(&runner.scheduler_fake_stack, f.stack, kStack);
  if (__builtin_setjmp(runner.scheduler.buffer) == 0) enter(*runner.current);
  __sanitizer_finish_switch_fiber(runner.scheduler_fake_stack, nullptr, nullptr);
  runner.current = nullptr;
}

// Lets the lanes of `f`'s collective go on if all lanes of its mask that are alive have come.
void complete_warp(const Fiber& f) {
  const unsigned first = f.linear / kWarp * kWarp, mask = f.mask;
  const unsigned last = std::min<unsigned>(first + kWarp, unsigned(runner.fibers.size()));
  for (unsigned i = first; i < last; ++i) {
    const Fiber& other = runner.fibers[i];
    if (!(mask >> (i - first) & 1) || other.state == State::kDone) continue;
    if (other.state != State::kWarp || other.mask != mask || std::strcmp(other.what, f.what) != 0) return;
  }
  auto snapshot = std::make_shared<Snapshot>();
  for (unsigned i = first; i < last; ++i) {
    Fiber& other = runner.fibers[i];
    if (!(mask >> (i - first) & 1) || other.state == State::kDone) continue;
    snapshot->present |= 1u << (i - first);
    std::memcpy(snapshot->data[i - first], other.deposit, other.size);
    other.snapshot = snapshot;
    make_ready(other);
  }
}

// A thread of each block, one after another.
void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &runner.scheduler_stack, &runner.scheduler_stack_size);
  for (;;) {
    (*runner.body)();
    Fiber& f = *runner.current;
    f.state = State::kDone;
    --runner.alive;
    const unsigned first = f.linear / kWarp * kWarp;  // a collective may have waited for this lane alone
    for (unsigned i = first; i < std::min<unsigned>(first + kWarp, unsigned(runner.fibers.size())); ++i) {
      if (runner.fibers[i].state == State::kWarp) complete_warp(runner.fibers[i]);
    }
    leave();
  }
}

// Called when no fiber can go on: either all have ended or are at one barrier, or it is an error.
void release_barrier() {
  const Fiber* at = nullptr;
  std::map<std::string, unsigned> places;
  bool same = true;
  for (const Fiber& f : runner.fibers) {
    if (f.state == State::kDone) {
      ++places["returned"];
      same = false;
    } else {
      ++places["at " + where(f)];
      same = same && f.state == State::kBarrier &&
             (!at || (at->line == f.line && !std::strcmp(at->file, f.file) && !std::strcmp(at->what, f.what)));
      at = &f;
    }
  }
  if (!same) {
    std::string text;
    for (const auto& [place, count] : places) text += (text.empty() ? "" : "; ") + std::to_string(count) + " " + place;
    fail("divergent barrier: of %zu threads: %s", runner.fibers.size(), text.c_str());
  }
  unsigned count = 0;
  for (const Fiber& f : runner.fibers) count += f.predicate;
  runner.barrier_count = count;
  order_threads();
  for (Fiber& f : runner.fibers) make_ready(f);
}

void run_block() {
  const Launch& launch = *runner.launch;
  runner.poisoned.clear();
  std::memset(runner.dynamic, runner.poison, launch.shared);
  runner.alive = unsigned(runner.fibers.size());
  order_threads();
  for (Fiber& f : runner.fibers) make_ready(f);
  while (runner.alive) {
    if (runner.ready.empty()) release_barrier();
    const unsigned next = runner.by_rank[*runner.ready.begin()];
    runner.ready.erase(runner.ready.begin());
    resume(runner.fibers[next]);
  }
}

}  // namespace

void fail(const char* format, ...) {
  print_context();
  std::fprintf(stderr, "shim: error: ");
  va_list list;
  va_start(list, format);
  std::vfprintf(stderr, format, list);
  va_end(list);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  _exit(1);
}

void run_grid(const Launch& launch, const std::function<void()>& body) {
  const dim3 block = launch.block, grid = launch.grid;
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    fail("kernel %s: a block of %u x %u x %u threads; 1 to 1024 are allowed", launch.kernel, block.x, block.y, block.z);
  }
  if (blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    fail("kernel %s: a grid of %u x %u x %u blocks cannot be launched", launch.kernel, grid.x, grid.y, grid.z);
  }
  if (launch.shared > kMaxShared) fail("kernel %s: %zu bytes of shared memory", launch.kernel, launch.shared);
  __sanitizer_set_death_callback(print_context);
  runner.launch = &launch;
  runner.body = &body;
  set_schedule(launch.schedule);
  if (posix_memalign(&runner.dynamic, 16, launch.shared)) fail("no memory for %zu shared bytes", launch.shared);
  gridDim = grid;
  blockDim = block;

  runner.fibers = std::vector<Fiber>(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& f = runner.fibers[i];
    f.stack = stack(i);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack;
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
    f.linear = unsigned(i);
    f.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
  }

  for (const size_t b : ordered<size_t>(blocks)) {
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block();
  }
  for (const Fiber& f : runner.fibers) __asan_unpoison_memory_region(f.stack, kStack);
  std::free(runner.dynamic);
  runner.fibers.clear();
  runner.launch = nullptr;
}

unsigned block_barrier(const char* what, bool predicate, const char* file, int line) {
  Fiber& f = *runner.current;
  f.what = what, f.file = file, f.line = line, f.predicate = predicate;
  f.state = State::kBarrier;
  leave();
  return runner.barrier_count;
}

std::shared_ptr<const Snapshot> warp_collective(const char* what, unsigned mask, const void* value, size_t size,
                                                const char* file, int line) {
  Fiber& f = *runner.current;
  f.what = what, f.file = file, f.line = line, f.mask = mask, f.size = size;
  if (!(mask >> lane_index() & 1)) fail("%s: lane %u is not in its mask %#x", where(f).c_str(), lane_index(), mask);
  std::memcpy(f.deposit, value, size);
  f.state = State::kWarp;
  complete_warp(f);
  leave();
  return std::move(f.snapshot);
}

unsigned lane_index() { return runner.current->linear % kWarp; }

void shared_variable(void* address, size_t size) {
  if (runner.current == nullptr) fail("a __shared__ variable is used outside of a kernel");
  if (!runner.poisoned.emplace(address, size).second) return;
  size_t total = 0;
  for (const auto& [where, bytes] : runner.poisoned) total += bytes;
  if (total > 48 << 10) fail("%zu bytes of static __shared__ memory; 48 KiB are allowed", total);
  std::memset(address, runner.poison, size);
}

void forget_memory() { named_memory.clear(); }

void name_memory(int buffer, const void* address, size_t size) {
  named_memory.push_back({buffer, static_cast<const char*>(address), size});
}

void* dynamic_shared() {
  if (runner.current == nullptr) fail("extern __shared__ memory is used outside of a kernel");
  return runner.dynamic;
}

}  // namespace dlkern_shim
