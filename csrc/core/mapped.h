// Reading the bytes of mapped files that may be gone: a file that was cut short, a disk that fails or a server that does not
// answer make the system send SIGBUS to whoever touches them, which by default ends the process without a word.
#pragma once

namespace pairclip {

// Calls read(argument) and says whether it came to its end; if bytes were not to be had, it is left where it stood: it may hold
// nothing that must be released. Such signals from elsewhere go to the handler that was there before.
bool touch_mapped(void (*read)(void*), void* argument);

// For anything that can be called and whose variables are plain.
template <class Read>
bool touch_mapped(Read read) {
  return touch_mapped([](void* call) { (*static_cast<Read*>(call))(); }, &read);
}

}  // namespace pairclip
