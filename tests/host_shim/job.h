// The main program of a compiled .cu: reads a job, runs its kernel under each schedule, writes the buffers back.
//
// A job file (written by program.py) is text, then the bytes of the buffers in their order:
//   <kernel> <grid x y z> <block x y z> <shared bytes>
//   <number of schedules>, each on a line of its own
//   <number of buffers>, each <bytes> <address modulo 64> <name of its dtype in torch>
//   <number of arguments>, each one of
//     null | buffer <index> | integer <value> | float <value, hexadecimal> |
//     bytes <n> <2n hexadecimal digits> <number of pointers in it, each <offset> <buffer index>>
#pragma once

#include <cstdio>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "runtime.h"

namespace dlkern_shim {

struct Buffer {
  size_t bytes, phase;
  std::string dtype;
  std::string initial;  // its bytes before the launch
  char* memory = nullptr;
  char* data = nullptr;
};

struct Argument {
  std::string kind;
  size_t buffer = 0;
  long long integer = 0;
  double real = 0;
  std::string bytes;
  std::vector<std::pair<size_t, size_t>> pointers;
};

struct Job {
  std::string kernel;
  dim3 grid, block;
  size_t shared;
  std::vector<std::string> schedules;
  std::vector<Buffer> buffers;
  std::vector<Argument> arguments;
};

template <typename T>
const char* dtype_name() {
  if (std::is_same<T, float>::value) return "float32";
  if (std::is_same<T, double>::value) return "float64";
  if (std::is_same<T, __half>::value) return "float16";
  if (std::is_same<T, __nv_bfloat16>::value) return "bfloat16";
  if (std::is_same<T, bool>::value) return "bool";
  if (!std::is_integral<T>::value) return nullptr;  // void, vectors, structs: anything
  static char name[16];
  std::snprintf(name, sizeof name, "%sint%zu", std::is_signed<T>::value ? "" : "u",
                8 * sizeof(std::conditional_t<std::is_void<T>::value, char, T>));
  return name;
}

// One argument as the kernel's parameter of type P. Sizes, ranges and pointed-to types have to fit.
template <typename P>
P parameter(const Job& job, size_t index) {
  const Argument& a = job.arguments[index];
  const auto wrong = [&](const std::string& expected) {
    fail("kernel %s: argument %zu is %s; the parameter is %s", job.kernel.c_str(), index, a.kind.c_str(),
         expected.c_str());
  };
  if constexpr (std::is_pointer<P>::value) {
    using T = std::remove_cv_t<std::remove_pointer_t<P>>;
    if (a.kind == "null") return nullptr;
    if (a.kind != "buffer") wrong("a pointer");
    const Buffer& b = job.buffers[a.buffer];
    const char* const name = dtype_name<T>();
    if (name && b.dtype != name) wrong(std::string("a pointer to ") + name + ", the tensor " + b.dtype);
    return reinterpret_cast<P>(b.data);
  } else if constexpr (std::is_integral<P>::value) {
    if (a.kind == "integer") {
      const bool fits = std::is_same<P, unsigned long long>::value || std::is_same<P, unsigned long>::value
                            ? a.integer >= 0
                            : static_cast<long long>(P(a.integer)) == a.integer;
      if (!fits)
        wrong("an integer of " + std::to_string(sizeof(P)) + " bytes that cannot hold " + std::to_string(a.integer));
      return P(a.integer);
    }
  } else if constexpr (std::is_floating_point<P>::value) {
    if (a.kind == "float") return P(a.real);
  }
  if constexpr (!std::is_pointer<P>::value) {
    static_assert(std::is_trivially_copyable<P>::value, "a kernel's parameters are copied byte by byte");
    if (a.kind != "bytes" || a.bytes.size() != sizeof(P)) {
      wrong("of " + std::to_string(sizeof(P)) + " bytes, given " + std::to_string(a.bytes.size()));
    }
    P value;
    std::memcpy(&value, a.bytes.data(), sizeof value);
    for (const auto& [offset, buffer] : a.pointers) {
      std::memcpy(reinterpret_cast<char*>(&value) + offset, &job.buffers[buffer].data, sizeof(void*));
    }
    return value;
  }
}

template <typename... P, size_t... I>
std::function<void()> prepare(void (*kernel)(P...), const Job& job, std::index_sequence<I...>) {
  if (job.arguments.size() != sizeof...(P)) {
    fail("kernel %s takes %zu arguments, given %zu", job.kernel.c_str(), sizeof...(P), job.arguments.size());
  }
  const std::tuple<std::remove_cv_t<P>...> values{parameter<std::remove_cv_t<P>>(job, I)...};
  return [kernel, values] { kernel(std::get<I>(values)...); };
}

struct Entry {
  const char* name;
  std::function<void()> (*prepared)(const Job&);
};
// A lambda of this shape for each kernel: [](const Job& job) { return prepare(kernel, job); }
template <typename... P>
std::function<void()> prepare(void (*kernel)(P...), const Job& job) {
  return prepare(kernel, job, std::index_sequence_for<P...>());
}

int run_job(const Entry* entries, size_t count, const char* in, const char* out);

}  // namespace dlkern_shim
