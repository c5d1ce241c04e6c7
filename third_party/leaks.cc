// Tells LeakSanitizer what of the system's libraries is known to leak. Without the sanitizer nothing calls it.

extern "C" const char* __lsan_default_suppressions();

// c-ares, which looks up names for gRPC, loses a few bytes with some answers.
extern "C" const char* __lsan_default_suppressions() { return "leak:libcares\n"; }
