// The operators that libraries serve, for calls that a kernel has no loop for.

namespace fxopt {

// The operator registered as `name`, with the signature of `kernel`: it takes the calls that
// `kernel` has no loop for.
template <class Result, class... Arguments>
auto library_of(Result (*kernel)(Arguments...), const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>();
}

}  // namespace fxopt
