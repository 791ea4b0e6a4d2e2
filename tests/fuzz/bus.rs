//! Every topic with every payload, at a broker and at a worker: the first line is the topic.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| {
    let (topic, payload) = message.split_at(message.iter().position(|byte| *byte == b'\n').unwrap_or(message.len()));
    let (Ok(topic), payload) = (str::from_utf8(topic), payload.get(1..).unwrap_or_default()) else { return };
    wgkex_broker::receive_anything(topic, payload, message.len() % 2 == 0);
    wgkex_worker::receive_anything(topic, payload);
});
