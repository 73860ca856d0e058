// Runs one call in a process of its own, where a sanitizer has been preloaded: runner LIBRARY < call > result.
// Both streams: integers and floats of 8 bytes, byte strings preceded by their length.
#include <cstdio>
#include <cstdlib>
#include <deque>

#include "call.h"

namespace {

template <class T>
T read() {
  T value;
  if (fread(&value, sizeof value, 1, stdin) != 1) exit(2);
  return value;
}

std::string read_string() {
  std::string text(read<int64_t>(), '\0');
  if (!text.empty() && fread(&text[0], text.size(), 1, stdin) != 1) exit(2);
  return text;
}

void write(int64_t value) { fwrite(&value, sizeof value, 1, stdout); }

void write(const std::string& text) {
  write(static_cast<int64_t>(text.size()));
  fwrite(text.data(), 1, text.size(), stdout);
}

enum Tag : int64_t { kNumber, kArray };

emu::Argument read_argument(std::deque<std::string>& arrays) {
  emu::Argument argument;
  if (read<int64_t>() == kNumber) {
    argument.value.integer = read<int64_t>();  // or the bits of a double
    return argument;
  }
  argument.writable = read<int64_t>();
  argument.unwritten = read<int64_t>();
  arrays.push_back(read_string());
  argument.host = &arrays.back()[0];
  argument.bytes = arrays.back().size();
  return argument;
}

}  // namespace

int main(int, char** argv) {
  const std::string library = argv[1], name = read_string();
  emu::options.seed = read<int64_t>();
  emu::options.resident = static_cast<int>(read<int64_t>());
  emu::options.yield = read<double>();
  std::deque<std::string> arrays;
  std::vector<emu::Argument> arguments(read<int64_t>());
  for (auto& argument : arguments) argument = read_argument(arrays);
  const emu::Entry& entry = emu::find_entry(library, name);
  const emu::Outcome outcome = emu::call(entry, arguments);
  const auto* text = entry.result == "const char*" ? static_cast<const char*>(outcome.value.pointer) : nullptr;
  write(outcome.value.integer);
  write(std::string(text ? text : ""));
  write(static_cast<int64_t>(outcome.reports.size()));
  for (const auto& report : outcome.reports) {
    write(report.kind);
    write(report.message);
    write(static_cast<int64_t>(report.at.size()));
    for (const auto& where : report.at) {
      write(where.library);
      write(static_cast<int64_t>(where.offset));
    }
  }
  for (const auto& argument : arguments)
    if (argument.writable) write(std::string(argument.host, argument.bytes));
}
