// Errors inside libdmi; api.cpp turns them into a status and a message.
#pragma once

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

#include "dmi/dmi.h"

namespace dmi {

struct Error : std::runtime_error {
  Error(dmi_status status, const std::string& message) : std::runtime_error(message), status(status) {}
  dmi_status status;
};

[[noreturn]] inline void invalid(const std::string& message) { throw Error(DMI_ERROR_INVALID, message); }

[[noreturn]] inline void system_error(const std::string& what) { throw Error(DMI_ERROR_SYSTEM, what + ": " + std::strerror(errno)); }

}  // namespace dmi
