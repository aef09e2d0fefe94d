// Reads a job, runs its kernel under each schedule with memory of its own, compares, and writes the buffers back.
#include "job.h"

#include <sanitizer/asan_interface.h>

#include <cstdlib>
#include <fstream>

namespace dlkern_shim {
namespace {

// A malloc of its own for each buffer, with the alignment that the tensor had: up to 7 bytes in front of it cannot be
// poisoned, and are looked at afterwards.
void allocate(Buffer& b) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, b.phase + b.bytes)) fail("no memory for a buffer of %zu bytes", b.bytes);
  b.memory = static_cast<char*>(memory);
  b.data = b.memory + b.phase;
  std::memset(b.memory, 0xa5, b.phase);
  std::memcpy(b.data, b.initial.data(), b.bytes);
  __asan_poison_memory_region(b.memory, b.phase & ~size_t(7));
}

std::string release(Buffer& b, size_t index) {
  __asan_unpoison_memory_region(b.memory, b.phase);
  for (size_t i = 0; i < b.phase; ++i) {
    if (static_cast<unsigned char>(b.memory[i]) == 0xa5) continue;
    fail("out of bounds: %zu bytes before the start of buffer %zu were written", b.phase - i, index);
  }
  std::string after(b.data, b.bytes);
  std::free(b.memory);
  return after;
}

std::string unhex(const std::string& text) {
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) bytes += char(std::stoi(text.substr(i, 2), nullptr, 16));
  return bytes;
}

Job read_job(const char* path) {
  std::ifstream in(path, std::ios::binary);
  Job job;
  size_t n;
  std::getline(in, job.kernel);
  for (dim3* d : {&job.grid, &job.block}) in >> d->x >> d->y >> d->z;
  in >> job.shared >> n;
  job.schedules.resize(n);
  in.ignore();
  for (std::string& s : job.schedules) std::getline(in, s);
  in >> n;
  job.buffers.resize(n);
  for (Buffer& b : job.buffers) in >> b.bytes >> b.phase >> b.dtype;
  in >> n;
  job.arguments.resize(n);
  for (Argument& a : job.arguments) {
    in >> a.kind;
    std::string text;
    if (a.kind == "buffer") in >> a.buffer;
    if (a.kind == "integer") in >> a.integer;
    if (a.kind == "float") in >> text, a.real = std::strtod(text.c_str(), nullptr);
    if (a.kind == "bytes") {
      size_t pointers;
      in >> text >> pointers;
      a.bytes = unhex(text);
      a.pointers.resize(pointers);
      for (auto& [offset, buffer] : a.pointers) in >> offset >> buffer;
    }
  }
  in.ignore();
  for (Buffer& b : job.buffers) {
    b.initial.resize(b.bytes);
    in.read(&b.initial[0], std::streamsize(b.bytes));
  }
  if (!in) fail("the job file %s ends early", path);
  return job;
}

}  // namespace

int run_job(const Entry* entries, size_t count, const char* in, const char* out) {
  Job job = read_job(in);
  const Entry* entry = nullptr;
  for (size_t i = 0; i < count; ++i) {
    if (job.kernel == entries[i].name) entry = &entries[i];
  }
  if (entry == nullptr) fail("no kernel %s in this build", job.kernel.c_str());
  std::vector<std::string> first;
  for (const std::string& schedule : job.schedules) {
    forget_memory();
    for (size_t i = 0; i < job.buffers.size(); ++i) {
      allocate(job.buffers[i]);
      name_memory(int(i), job.buffers[i].data, job.buffers[i].bytes);
    }
    run_grid({job.kernel.c_str(), job.grid, job.block, job.shared, schedule.c_str()}, entry->prepared(job));
    std::vector<std::string> after;
    for (size_t i = 0; i < job.buffers.size(); ++i) after.push_back(release(job.buffers[i], i));
    if (first.empty()) first = after;
    for (size_t i = 0; i < after.size(); ++i) {
      if (after[i] == first[i]) continue;
      size_t byte = 0;
      while (after[i][byte] == first[i][byte]) ++byte;
      fail(
          "race: buffer %zu (%s) differs at byte %zu of %zu between the schedules %s and %s: a barrier is missing, or "
          "memory is read that nothing has written",
          i, job.buffers[i].dtype.c_str(), byte, after[i].size(), job.schedules[0].c_str(), schedule.c_str());
    }
  }
  std::ofstream result(out, std::ios::binary);
  for (const std::string& bytes : first) result.write(bytes.data(), std::streamsize(bytes.size()));
  return result ? 0 : 1;
}

}  // namespace dlkern_shim
