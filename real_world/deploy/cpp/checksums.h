// Verify the checksums of a package before it is loaded, which PyTorch does not do.

#pragma once

#include <caffe2/serialize/crc_alt.h>
#include <caffe2/serialize/inline_container.h>

#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

// Throws if a record of a package does not have the CRC-32 that was stored with it.
inline void verify_checksums(const std::string& path) {
  caffe2::serialize::PyTorchStreamReader reader(path);
  std::ifstream file(path, std::ios::binary);
  const auto read_uint32 = [&file](size_t offset) {
    unsigned char bytes[4] = {};  // little-endian
    file.seekg(static_cast<std::streamoff>(offset)).read(reinterpret_cast<char*>(bytes), 4);
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
  };
  std::vector<char> buffer(1 << 16);
  for (const std::string& name : reader.getAllRecords()) {
    const size_t size = reader.getRecordSize(name);
    auto chunks = reader.createChunkReaderIter(name, size, buffer.size());
    uint32_t crc = 0;
    while (const size_t count = chunks.next(buffer.data())) {
      crc = crc32_fast(buffer.data(), count, crc);
    }
    // The checksum is in the record's header (Python's zipfile) or, if bit 3 of the flags there
    // is set, in a data descriptor after the record (PyTorch).
    const size_t header = reader.getRecordHeaderOffset(name);
    const bool has_descriptor = read_uint32(header + 6) & 8;
    const size_t descriptor = reader.getRecordOffset(name) + size;
    const uint32_t expected = read_uint32(has_descriptor ? descriptor + 4 : header + 14);
    if (crc != expected) throw std::runtime_error("its record " + name + " is damaged");
  }
}
