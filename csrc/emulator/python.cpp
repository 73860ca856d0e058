// The emulator for Python: runs entries of a kernel library, in this process, on numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call.h"

namespace py = pybind11;

namespace {

// None, a number, or (array, unwritten)
emu::Argument to_argument(const py::handle& given) {
  emu::Argument argument;
  if (py::isinstance<py::tuple>(given)) {
    const auto pair = given.cast<py::tuple>();
    const auto array = pair[0].cast<py::array>();
    argument.host = static_cast<char*>(const_cast<void*>(array.data()));
    argument.bytes = static_cast<size_t>(array.nbytes());
    argument.writable = array.writeable();
    argument.unwritten = pair[1].cast<bool>();
  } else if (py::isinstance<py::float_>(given)) {
    argument.value.real = given.cast<double>();
  } else if (!given.is_none()) {
    argument.value.integer = given.cast<int64_t>();
  }
  return argument;
}

py::object to_python(const emu::Value& value, const std::string& type) {
  if (type == "void") return py::none();
  if (type == "const char*") return value.pointer ? py::object(py::str(static_cast<const char*>(value.pointer))) : py::none();
  if (type[0] == 'f') return py::float_(value.real);
  return py::int_(value.integer);
}

py::list places(const std::vector<emu::Where>& at) {
  py::list list;
  for (const auto& where : at) list.append(py::make_tuple(where.library, where.offset));
  return list;
}

py::dict entries(const std::string& library) {
  py::dict found;
  for (const auto& entry : emu::load_entries(library)) found[entry.name] = py::make_tuple(entry.parameters, entry.result);
  return found;
}

py::tuple run(const std::string& library, const std::string& name, const py::list& given, uint64_t seed, int resident,
              double yield, bool tracing) {
  const emu::Entry& entry = emu::find_entry(library, name);
  std::vector<emu::Argument> arguments;
  for (const auto& one : given) arguments.push_back(to_argument(one));
  emu::options = {seed, resident, yield, tracing};
  emu::clear_trace();
  const emu::Outcome outcome = emu::call(entry, arguments);
  py::list reports, lines;
  for (const auto& report : outcome.reports) reports.append(py::make_tuple(report.kind, report.message, places(report.at)));
  for (const auto& t : emu::traffic())
    lines.append(py::make_tuple(places({emu::locate(t.pc)}), t.access, t.space, t.bytes, t.requests, t.lanes, t.sectors,
                                t.ideal_sectors, t.passes, t.ideal_passes));
  return py::make_tuple(to_python(outcome.value, entry.result), reports, lines);
}

}  // namespace

PYBIND11_MODULE(gpu_emulator, m) {
  m.def("entries", &entries, "library -> {entry: (parameter types, result type)}");
  m.def("run", &run, "-> (value, reports, traffic)");
}
