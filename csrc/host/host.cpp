// Host functions that never touch a tensor: no torch headers, works with any torch.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

namespace py = pybind11;

// Philox4x32-10 as published (Salmon et al., 2011), one block at a time: the known-answer check of the kernels' streams.
static std::array<uint32_t, 4> philox4x32(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0], p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    k = {k[0] + 0x9E3779B9u, k[1] + 0xBB67AE85u};
  }
  return c;
}

PYBIND11_MODULE(_host, m) {
  m.def(
      "philox4x32",
      [](uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
        const auto r = philox4x32({c0, c1, c2, c3}, {k0, k1});
        return py::make_tuple(r[0], r[1], r[2], r[3]);
      },
      py::arg("c0"), py::arg("c1"), py::arg("c2"), py::arg("c3"), py::arg("k0"), py::arg("k1"),
      "One block of Philox4x32-10: four words from a counter (c0 ... c3) and a key (k0, k1).");
}
