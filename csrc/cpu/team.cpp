#include "team.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define DLKERN_HAS_FORK 1
#else
#define DLKERN_HAS_FORK 0
#endif

namespace dlkern::cpu {

namespace {
bool in_child = false;
}

bool forked() { return in_child; }

#if DLKERN_HAS_FORK
namespace {
void enter_child() { in_child = true; }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, &enter_child);
}  // namespace
#endif

}  // namespace dlkern::cpu
