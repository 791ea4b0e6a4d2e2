//! The body of a router's request.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use wgkex_broker::exchange::request;
use wgkex_common::Domain;

fuzz_target!(|body: &[u8]| {
    let domains: BTreeSet<_> = Domain::new("ff_a", &["ff_".into()]).into_iter().collect();
    if let Err(rejection) = request::parse(body, &domains) {
        assert!(!rejection.to_string().is_empty());
    }
});
