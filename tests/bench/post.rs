//! How long a router waits for its answer, which comes when its key is in the kernel.

use std::time::{Duration, Instant};

use wgkex_tests::http::ask;
use wgkex_tests::stack::{Bus, V2};

use crate::gateway::{DOMAIN, Gateway, assert_holds, keys};

/// The times of so many POSTs of new keys, while so many peers are there already.
pub fn measure(peers: u32, posts: u32) -> Vec<Duration> {
    let mut gateway = Gateway::new(Bus::Embedded);
    let mut keys = keys(peers + posts);
    let new = keys.split_off(peers as usize);
    gateway.by_c_tools(&keys);
    gateway.stack.start_broker();
    gateway.stack.wait_until_ready();
    gateway.start_worker();
    gateway.stack.wait_for_gateways(1);

    let mut router = gateway.stack.connect();
    let times = new.iter().map(|key| {
        let body = ask(DOMAIN, &key.to_string());
        let began = Instant::now();
        let response = router.post(V2, &body);
        let time = began.elapsed();
        assert_eq!(response.status, 200, "{response:?}");
        time
    });
    let times = times.collect();
    assert_holds((peers + posts) as usize);
    times
}
