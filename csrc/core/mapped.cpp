#include "core/mapped.h"

#include <csetjmp>
#include <csignal>
#include <mutex>

namespace pairclip {
namespace {

thread_local sigjmp_buf* landing = nullptr;
struct sigaction before;

void on_bus_error(int, siginfo_t*, void*) {
  if (landing != nullptr) siglongjmp(*landing, 1);
  sigaction(SIGBUS, &before, nullptr);  // the instruction is tried again, and then it is the other's
}

void install() {
  struct sigaction ours{};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler may be left by a jump, so the signal must not stay blocked
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, &before);
}

}  // namespace

bool touch_mapped(void (*read)(void*), void* argument) {
  static std::once_flag installed;
  std::call_once(installed, install);
  sigjmp_buf here;
  if (sigsetjmp(here, 0) != 0) {
    landing = nullptr;
    return false;
  }
  landing = &here;
  read(argument);
  landing = nullptr;
  return true;
}

}  // namespace pairclip
