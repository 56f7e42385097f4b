// What the door asks before the first CUDA op on a device.
#pragma once

namespace tokenflow_ext {

// nullptr, or a sentence: the driver is missing or older than the runtime that is linked in, or the device is too old.
const char* device_problem(int device) noexcept;

}  // namespace tokenflow_ext
