//! Roles of this program, each in a process of its own: a bare HTTP server, a worker without a kernel, and real workers
//! on kernels in memory.

use std::collections::VecDeque;
use std::fs;
use std::future::pending;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::web::{self, Json};
use actix_web::{App, HttpResponse, HttpServer};
use rumqttc::Event::Incoming;
use rumqttc::{AsyncClient, MqttOptions, NetworkOptions, Packet, QoS};
use serde::Deserialize;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;
use wgkex_common::config::{Level, LogFormat};
use wgkex_common::mqtt::{self, Event, Message, MqttHandle, Publish, SessionConfig};
use wgkex_common::runtime::log;
use wgkex_common::{Config, Topic};
use wgkex_kernel::memory::Delays;
use wgkex_tests::probe;
use wgkex_tests::process::Process;
use wgkex_tests::scripted;
use wgkex_tests::stack::V1;

use crate::counted::Counted;

/// Keys per confirmation of a worker without a kernel.
const BATCH: usize = 1_000;

/// How often workers poll their progress.
const LOOK: Duration = Duration::from_millis(20);

/// Starts this program in another role, with these arguments.
pub fn start(part: &str, words: &[&str]) -> Process {
    let this = std::env::current_exe().expect("the path of this program");
    Process::start(part, Command::new(this).args(["play", part]).args(words))
}

/// Runs the role that `words` name, for ever.
pub fn run_role(words: &[String]) {
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["bare", address] => bare(address),
        ["publishing", address, server] => publishing(address, server),
        ["confirming", file, name] => Runtime::new().unwrap().block_on(worker(file, name, true)),
        ["original", file, name] => Runtime::new().unwrap().block_on(worker(file, name, false)),
        ["workers", file, wanted, delays, first, ref names @ ..] => {
            log::init(Level::WARN, LogFormat::Text);
            let first = first.parse().expect("a port");
            Runtime::new().unwrap().block_on(workers(
                file,
                wanted.parse().expect("a number"),
                parse(delays),
                first,
                names,
            ));
        }
        _ => panic!("not a part: {words:?}"),
    }
}

/// A router's request.
#[derive(Deserialize)]
struct Ask {
    domain: String,
    public_key: String,
}

/// An HTTP server that parses a router's request, and answers.
fn bare(address: &str) {
    let answer = |ask: Json<Ask>| async move {
        assert!(!ask.domain.is_empty() && ask.public_key.len() == 44);
        HttpResponse::Ok().json(serde_json::json!({ "Message": "OK" }))
    };
    serve(address, answer);
}

fn serve<F, A>(address: &str, answer: F)
where
    F: Fn(Json<Ask>) -> A + Clone + Send + 'static,
    A: Future<Output = HttpResponse> + 'static,
{
    let server = HttpServer::new(move || App::new().route(V1, web::post().to(answer.clone()))).bind(address);
    let server = server.expect("a free port").run();
    actix_web::rt::System::new().block_on(server).expect("it serves");
}

/// The same, whose answer waits until the MQTT server has acknowledged the key: rumqttc with its defaults, and nothing
/// else.
fn publishing(address: &str, server: &str) {
    let server: SocketAddr = server.parse().expect("an address");
    let mut options = MqttOptions::new("publishing", server.ip().to_string(), server.port());
    options.set_inflight(100);
    let (client, mut eventloop) = AsyncClient::new(options, 200);
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    eventloop.set_network_options(network);
    let waiting = Arc::new(Mutex::new(VecDeque::<oneshot::Sender<()>>::new()));
    let acknowledged = waiting.clone();
    std::thread::spawn(move || {
        Runtime::new().unwrap().block_on(async {
            loop {
                if let Incoming(Packet::PubAck(_)) = eventloop.poll().await.expect("an MQTT server") {
                    let first = acknowledged.lock().unwrap().pop_front().expect("a publish");
                    first.send(()).expect("a request that waits");
                }
            }
        });
    });
    let answer = move |ask: Json<Ask>| {
        let (done, published) = oneshot::channel();
        let mut waiting = waiting.lock().unwrap();
        waiting.push_back(done);
        let Ask { domain, public_key } = ask.into_inner();
        let sent = client.try_publish(format!("wireguard/{domain}/all"), QoS::AtLeastOnce, false, public_key);
        sent.expect("room for a publish");
        async {
            published.await.expect("an acknowledgement");
            HttpResponse::Ok().json(serde_json::json!({ "Message": "OK" }))
        }
    };
    serve(address, answer);
}

/// A worker that has every key at once, and confirms it if `confirms`.
async fn worker(file: &str, name: &str, confirms: bool) {
    let config = Config::parse(file, &fs::read_to_string(file).unwrap(), name).unwrap();
    let domain = config.domains.first().expect("a domain").name().to_owned();
    let ears = SessionConfig {
        qos1_filters: vec![Topic::keys(&domain)],
        is_secondary: false,
        ..SessionConfig::secondary(name.into())
    };
    let (bus, session) = mqtt::open(&config.mqtt, ears).unwrap();
    let (confirmations, confirming) =
        mqtt::open(&config.mqtt, SessionConfig::secondary(format!("{name}-applied"))).unwrap();
    let (sender, mut keys) = mpsc::unbounded_channel();
    let hand_on = move |event| {
        if let Event::Message(publish) = event {
            // Once the receiver is dropped, the process ends.
            let _ = sender.send(publish);
        }
    };
    tokio::spawn(session.run(hand_on, pending()));
    tokio::spawn(confirming.run(|_| {}, pending()));
    let hello = confirms.then(|| scripted::hello(name));
    let states = [scripted::data(name, &domain), scripted::peers_of(name, &domain, "0"), scripted::status(name, "1")];
    for message in hello.into_iter().chain(states) {
        publish_retained(&bus, message).await;
    }
    let mut batch = Vec::new();
    while keys.recv_many(&mut batch, BATCH).await > 0 {
        let applied = applied(&domain, &batch);
        batch.clear();
        if confirms {
            let message = Message::transient(Topic::Applied { worker: name.parse().unwrap() }, applied);
            confirmations.publish(message).await.unwrap();
        }
    }
}

async fn publish_retained(bus: &MqttHandle, message: probe::Message) {
    let topic = Topic::parse(&message.topic).expect("a topic of the contract");
    bus.publish(Message::retained(topic, message.payload)).await.unwrap();
}

fn applied(domain: &str, keys: &[Publish]) -> String {
    let keys: Vec<_> = keys.iter().map(|key| format!("\"{}\"", String::from_utf8_lossy(&key.payload))).collect();
    format!(r#"{{"domain":"{domain}","installed":[{}],"failed":{{}}}}"#, keys.join(","))
}

/// Real workers of these names, each with a kernel in memory. Prints the number of keys of the slowest worker whenever
/// it changes, and `full` once all have all wanted keys. In the config file `@name@` and `@port@` stand for each
/// worker's name and port.
async fn workers(file: &str, wanted: u32, delays: Delays, first: u16, names: &[&str]) {
    let yaml = fs::read_to_string(file).unwrap();
    let mut counts = Vec::new();
    for (name, port) in names.iter().zip(first..) {
        let own = yaml.replace("@name@", name).replace("@port@", &port.to_string());
        let config = Config::parse(file, &own, name).unwrap();
        let domains: Vec<_> = config.domains.iter().cloned().collect();
        let kernel = Counted::new(&domains, delays);
        counts.push(kernel.count());
        let no_servers = || Err(std::io::Error::other("a gateway without servers"));
        tokio::spawn(async move {
            wgkex_worker::run(config, kernel, no_servers, pending()).await.expect("a worker that runs");
        });
    }
    let least = |counts: &[Arc<AtomicU32>]| counts.iter().map(|count| count.load(Ordering::Relaxed)).min();
    let mut said = 0;
    loop {
        let least = least(&counts).unwrap_or_default();
        if least != said {
            println!("{}", if least >= wanted { "full".into() } else { format!("has {least}") });
            said = least;
        }
        sleep(LOOK).await;
    }
}

/// Delays as one argument.
pub fn word(delays: Delays) -> String {
    [delays.read, delays.apply, delays.change].map(|delay| delay.as_micros().to_string()).join(",")
}

fn parse(word: &str) -> Delays {
    let delays: Vec<_> = word.split(',').map(|delay| Duration::from_micros(delay.parse().expect("a delay"))).collect();
    Delays { read: delays[0], apply: delays[1], change: delays[2] }
}

/// The last number of keys that a process with role `workers` has printed; `full` is the maximum.
pub fn has(workers: &Process) -> u32 {
    let log = workers.log();
    let last = log.lines().rev().find_map(|line| match line.strip_prefix("has ") {
        Some(number) => number.parse().ok(),
        None => (line == "full").then_some(u32::MAX),
    });
    last.unwrap_or_default()
}
