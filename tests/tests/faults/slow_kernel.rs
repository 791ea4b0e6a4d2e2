//! A kernel whose dump takes ten seconds: the one in memory, with the worker in this process.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime;
use tokio::sync::oneshot;
use wgkex_common::Config;
use wgkex_tests::http::{Http, ask};

use wgkex_kernel::memory::{Delays, MemoryKernel};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack, V2, free_address};
use wgkex_tests::{key, wait_until};

/// The time of a dump; a connection that is silent for half of it is considered dead.
const DUMP: Duration = Duration::from_secs(10);
const KEEPALIVE: u16 = 5;

#[test]
fn a_kernel_slower_than_the_keep_alive_costs_no_connection_and_no_confirmation() {
    let patient = "confirm_timeout: 40\nconfirm_budget: 40";
    let stack = Stack::start(Plan::new(Bus::Mosquitto).config(patient));
    let witness = stack.witness();
    let metrics = free_address();
    let yaml = format!(
        "domains: [{DOMAIN}]\ndomain_prefixes: [ffx_]\nstate_dir: {}\nworker_listen: \"{metrics}\"\n\
         mqtt: {{broker_url: {}, broker_port: {}, keepalive: {KEEPALIVE}}}\n",
        stack.dir().join("worker").display(),
        stack.mqtt.ip(),
        stack.mqtt.port(),
    );
    let config = Config::parse("test", &yaml, "slow").unwrap();
    let domains: Vec<_> = config.domains.iter().cloned().collect();
    let kernel = MemoryKernel::with(&domains);
    let (stop, stopped) = oneshot::channel::<()>();
    let worker = {
        let kernel = kernel.clone();
        thread::spawn(move || {
            let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(wgkex_worker::run(config, kernel.clone(), move || Ok(kernel), async {
                let _ = stopped.await;
            }))
        })
    };
    wait_until("the domain is served", || (stack.v2(DOMAIN, &key(0)).status == 200).then_some(()));
    kernel.delay(Delays { read: DUMP, ..Delays::default() });

    let begun = Instant::now();
    let mut asked = BTreeSet::new();
    for n in 0.. {
        // Always a dump is running, or about to start.
        kernel.trigger();
        asked.insert(key(n));
        let answer = Http::connect(stack.http).post(V2, &ask(DOMAIN, &key(n)));
        assert_eq!(answer.status, 200, "{answer:?}");
        if begun.elapsed() > 3 * DUMP {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    assert!(kernel.reads() >= 3, "{} dumps", kernel.reads());
    let peers = kernel.device(&domains[0]).unwrap().peers;
    assert_eq!(peers.keys().map(ToString::to_string).collect::<BTreeSet<_>>(), asked);
    let messages: Vec<_> =
        witness.received().into_iter().filter(|message| message.topic == "wireguard-worker/slow/status").collect();
    assert!(
        messages.len() == 1 && messages[0].text() == "1",
        "it connected once, and no will was published: {messages:?}"
    );
    let connected = Http::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, metrics.port()))).get("/metrics").body;
    assert!(connected.contains("wgkex_worker_mqtt_connected 1"), "{connected}");
    drop(stop);
    worker.join().unwrap().unwrap();
}
