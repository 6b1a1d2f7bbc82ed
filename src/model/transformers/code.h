// The Python by which transformers runs our own layout, as texts (cmake/rooms.cmake makes them of
// the files beside this one).
#pragma once

namespace cambium {

extern const char configuration_cambium_py[];
extern const char feed_forwards_cambium_py[];
extern const char mixers_cambium_py[];
extern const char modeling_cambium_py[];
extern const char sequences_cambium_py[];

}  // namespace cambium
