// Registered when Python asks for it, once nothing else is registered for CPUs under these names.

static std::unique_ptr<torch::Library> registered;

extern "C" void register_kernels() {
  if (registered) return;
  registered = std::make_unique<torch::Library>(torch::Library::IMPL, "fxopt",
                                                c10::DispatchKey::CPU, __FILE__, __LINE__);
  registered->impl("cached_attention", fxopt::cached_attention);
  registered->impl("int8_weight_only_linear", fxopt::int8_weight_only_linear);
  registered->impl("int4_weight_only_linear", fxopt::int4_weight_only_linear);
  registered->impl("int8_grouped_linear", fxopt::int8_grouped_linear);
  registered->impl("int4_grouped_linear", fxopt::int4_grouped_linear);
  registered->impl("half_weight_only_linear", fxopt::half_weight_only_linear);
  registered->impl("int8_cached_attention", fxopt::int8_cached_attention);
  registered->impl("append_slots", fxopt::append_slots);
  registered->impl("execute", fxopt::execute);
}

extern "C" void unregister_kernels() { registered.reset(); }
