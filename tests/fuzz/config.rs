//! A config file.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wgkex_common::Config;

fuzz_target!(|yaml: &str| {
    if let Err(error) = Config::parse("fuzz.yaml", yaml, "host") {
        assert!(error.mistakes.iter().all(|mistake| !mistake.to_string().contains('\n')));
    }
});
