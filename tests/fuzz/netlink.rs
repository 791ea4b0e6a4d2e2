//! Netlink answers of the kernel.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|answer: &[u8]| wgkex_kernel::netlink::read_answer(answer));
