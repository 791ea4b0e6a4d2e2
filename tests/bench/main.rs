//! Measures on a real kernel, beside the C tools: how long a POST takes until its key is in the kernel (`post`), and
//! how fast many keys go in (`bulk`). Started by `tests/bench/run`, in a virtual machine.

#![expect(clippy::print_stdout, reason = "its output is what it is for")]
#![expect(clippy::unwrap_used, reason = "what fails ends the measurement")]

mod bulk;
mod gateway;
mod post;

use std::time::Duration;

fn main() {
    let wanted: Vec<_> = std::env::args().skip(1).collect();
    let wanted = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    gateway::make_namespaces();
    println!("{}, {} CPUs", gateway::run("uname -srvm"), std::thread::available_parallelism().unwrap());
    if wanted("bulk") {
        print_bulk();
    }
    if wanted("post") {
        print_post();
    }
}

fn print_bulk() {
    println!("\nbulk, from the first message to the last flood entry; s (median of {})", bulk::ROUNDS);
    for keys in [1_000, 20_000] {
        println!("{keys} keys\n{}", bulk::measure(keys));
    }
}

fn print_post() {
    println!("\nPOST to kernel, v2, one after the other; ms        p50     p90     p99     max");
    for peers in [0, 20_000] {
        let mut times = post::measure(peers, 1_000);
        times.sort();
        let at = |share: usize| milliseconds(times[(times.len() * share / 100).min(times.len() - 1)]);
        let row = [at(50), at(90), at(99), at(100)].map(|time| format!("{time:8.2}")).concat();
        println!("{:44}{row}", format!("{peers} peers there"));
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
