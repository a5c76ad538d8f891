// How C++ errors become return values: null or a negative number, and a line of text for `vora_last_error`; and how a kernel
// of ours is an operator to libtorch's profiler.
#pragma once

#include <ATen/record_function.h>
#include <c10/util/Exception.h>

#include <string>
#include <vector>

// The rest of the scope, as an operator of that name with those tensors and numbers; they are not looked at where nobody profiles.
#define SHOWN_AS(NAME, ...) RECORD_FUNCTION(NAME, std::vector<c10::IValue>({__VA_ARGS__}))

inline thread_local std::string last_error;

inline std::string first_line(const char* text) {
  std::string line(text);
  return line.substr(0, line.find('\n'));
}

template <typename R, typename F>
R guard(R failed, F&& f) {
  try {
    return f();
  } catch (const c10::Error& e) {
    last_error = first_line(e.what_without_backtrace());
  } catch (const std::exception& e) {
    last_error = first_line(e.what());
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return failed;
}
