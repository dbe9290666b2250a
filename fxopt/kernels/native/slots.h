// Slots that are written behind those which a cache holds, for all its tensors in one call.
//
// A room [R, B, G, ...] has space for more than the P slots that are filled, which a cache hands out
// as heads, [B, G, P, ...]: a view of the room's beginning.

namespace fxopt {
namespace {

// Whether `heads` are the beginning of `room`, and so many slots like `fresh` [S, B, G, ...] fit
// behind them.
inline bool goes_behind(const at::Tensor& heads, const at::Tensor& room, const at::Tensor& fresh) {
  if (heads.dim() != 4 || room.dim() != 4 || fresh.dim() != 4) return false;
  const bool alike = heads.data_ptr() == room.data_ptr() && heads.dtype() == room.dtype() &&
                     fresh.dtype() == room.dtype() && fresh.is_cpu();
  const auto is_axis = [&](int64_t of_heads, int64_t of_room) {
    return heads.stride(of_heads) == room.stride(of_room) &&
           (of_room == 0 || heads.size(of_heads) == room.size(of_room));
  };
  const int64_t filled = heads.size(2);
  return alike && room.is_contiguous() && fresh.is_contiguous() && is_axis(0, 1) && is_axis(1, 2) &&
         is_axis(2, 0) && is_axis(3, 3) && fresh.sizes().slice(1) == room.sizes().slice(1) &&
         filled + fresh.size(0) <= room.size(0);
}

// The filled parts as heads, then slot by slot, [P + S, B, G, ...]; none, and nothing written, where
// one of them has no room.
inline std::vector<at::Tensor> append_slots(at::TensorList heads, at::TensorList rooms,
                                            at::TensorList fresh) {
  const size_t count = heads.size();
  TORCH_CHECK(rooms.size() == count && fresh.size() == count,
              "fxopt::append_slots: each tensor of heads has a room and what is put behind it");
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  std::vector<at::Tensor> found;
  for (size_t i = 0; i < count; ++i) {
    if (!goes_behind(heads[i], rooms[i], fresh[i])) return found;
  }
  found.resize(2 * count);
  for (size_t i = 0; i < count; ++i) {
    const at::Tensor& room = rooms[i];
    const int64_t filled = heads[i].size(2), length = filled + fresh[i].size(0);
    const int64_t slot = room.stride(0) * int64_t(room.element_size());
    std::memcpy(static_cast<char*>(room.mutable_data_ptr()) + filled * slot,
                fresh[i].const_data_ptr(), fresh[i].nbytes());
    const at::IntArrayRef sizes = room.sizes(), strides = room.strides();
    found[i] = room.as_strided({sizes[1], sizes[2], length, sizes[3]},
                               {strides[1], strides[2], strides[0], strides[3]});
    found[count + i] = room.as_strided({length, sizes[1], sizes[2], sizes[3]}, strides);
  }
  return found;
}

}  // namespace
}  // namespace fxopt
