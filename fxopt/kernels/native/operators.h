// Registered when Python asks for it, once nothing else is registered for CPUs under these names.

TORCH_LIBRARY_FRAGMENT(fxopt, library) { library.def("pack_panels(Tensor weight) -> Tensor"); }

TORCH_LIBRARY_IMPL(fxopt, CPU, library) { library.impl("pack_panels", fxopt::pack_panels); }

static std::unique_ptr<torch::Library> registered;

extern "C" void register_kernels() {
  if (registered) return;
  registered = std::make_unique<torch::Library>(torch::Library::IMPL, "fxopt",
                                                c10::DispatchKey::CPU, __FILE__, __LINE__);
  registered->impl("packed_linear", fxopt::packed_linear);
  registered->impl("attention", fxopt::attention);
  registered->impl("quantized_attention", fxopt::quantized_attention);
  registered->impl("int8_product", fxopt::int8_product);
  registered->impl("packed_int8_linear", fxopt::packed_int8_linear);
  registered->impl("int8_linear_fused", fxopt::int8_linear_fused);
  registered->impl("quantize_tokens", fxopt::quantize_tokens);
  registered->impl("int8_linear_fused_tokens", fxopt::int8_linear_fused_tokens);
  registered->impl("packed_int8_linear_tokens", fxopt::packed_int8_linear_tokens);
}

extern "C" void unregister_kernels() { registered.reset(); }
