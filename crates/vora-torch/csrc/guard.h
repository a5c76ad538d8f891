// How C++ errors become return values: null or a negative number, and a line of text for `vora_last_error`.
#pragma once

#include <c10/util/Exception.h>

#include <string>

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
