//! The share of the server that one user may take: connections, memory, and CPU time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rumqttc::{Connect, Login, Packet, Publish, QoS, Subscribe, SubscribeFilter, Unsubscribe};
use wgkex_tests::key;
use wgkex_tests::raw_client::{RawClient, connect_with_will};
use wgkex_tests::scripted::{Worker, WorkerBehaviour, applied, endpoint, key_for};
use wgkex_tests::stack::{Bus, DOMAIN, Plan, Stack};

use crate::access::{TWO, join, plan, stack};
use crate::{assert_serving, memory};

/// The log line for a lost connection of a program, also of the broker's own.
const LOST: &str = "MQTT not connected";

fn slowed(stack: &Stack, reason: &str) -> f64 {
    stack.metric(&format!("wgkex_broker_mqtt_slowed_total{{reason=\"{reason}\"}}")).unwrap_or_default()
}

fn written(packet: &Packet) -> BytesMut {
    let mut bytes = BytesMut::new();
    packet.write(&mut bytes, usize::MAX).unwrap();
    bytes
}

fn ping(raw: &mut RawClient) {
    raw.send(&Packet::PingReq);
    assert_eq!(raw.read(), Some(Packet::PingResp));
}

/// Regression: the ninth connection of gw1 took the last place, and gw2 was refused for a full server.
#[test]
fn a_worker_with_many_client_ids_takes_no_connections_of_others() {
    let mut stack = Stack::start(plan(&TWO, ", max_connections: 10"));
    let mut used = join(&stack, "gw1", "gw1");
    let mut unused = Vec::new();
    for n in 0..20 {
        unused.push(join(&stack, "gw1", &format!("gw1-x{n}")));
        ping(&mut used);
    }
    // The connections that were silent for longest made room: four are left, including the one in use.
    unused[..17].iter_mut().for_each(RawClient::wait_for_end);
    unused[17..].iter_mut().for_each(ping);
    let mut others: Vec<_> = ["gw2", "gw2-applied"].map(|id| join(&stack, "gw2", id)).into();
    others.extend(["b", "b-keys"].map(|id| join(&stack, "b", id)));
    others.iter_mut().for_each(ping);
    stack.wait_until_ready();
}

/// Regression: 30 MB were in memory.
#[test]
fn packets_that_do_not_end_take_little_memory_and_none_is_lost() {
    const SIZE: usize = 1_000_000;
    let mut stack = stack(&TWO);
    // A message on a forbidden topic is acknowledged, and not delivered.
    let packet = written(&Packet::Publish(Publish { pkid: 1, ..Publish::new("x", QoS::AtLeastOnce, vec![0; SIZE]) }));
    let (most, rest) = packet.split_at(SIZE * 9 / 10);
    let mut raws: Vec<_> = (0..30).map(|n| join(&stack, "gw1", &format!("gw1-{n}"))).collect();
    let (before, may_end) = (memory(&mut stack), AtomicBool::new(false));
    let most_memory = thread::scope(|scope| {
        let may_end = &may_end;
        let sending: Vec<_> = raws
            .iter_mut()
            .map(|raw| {
                scope.spawn(move || {
                    raw.send_bytes(most);
                    while !may_end.load(Ordering::Relaxed) {
                        thread::sleep(Duration::from_millis(5));
                    }
                    raw.send_bytes(rest);
                    assert!(matches!(raw.read(), Some(Packet::PubAck(_))));
                })
            })
            .collect();
        let begun = Instant::now();
        let mut most_memory = before;
        while !sending.iter().all(thread::ScopedJoinHandle::is_finished) {
            most_memory = most_memory.max(memory(&mut stack));
            may_end.fetch_or(begun.elapsed() > Duration::from_secs(1), Ordering::Relaxed);
            thread::sleep(Duration::from_millis(5));
        }
        most_memory
    });
    assert!(most_memory < before + (16 << 20), "{before} bytes before, {most_memory} with unfinished packets");
    assert!(slowed(&stack, "unfinished") > 0.0);
}

/// Regression: it was compared with each subscription, and answered.
#[test]
fn a_packet_of_too_many_topics_ends_the_connection() {
    let mut stack = stack(&TWO);
    let topics = |count: u32| (0..count).map(|n| format!("wireguard/{n:06}/+"));
    let subscribe = |count| Subscribe::new_many(topics(count).map(|path| SubscribeFilter::new(path, QoS::AtMostOnce)));
    let mut raw = join(&stack, "gw1", "gw1");
    raw.send(&Packet::Subscribe(Subscribe { pkid: 1, ..subscribe(1_000) }));
    assert!(matches!(raw.read(), Some(Packet::SubAck(ack)) if ack.return_codes.len() == 1_000));
    raw.send(&Packet::Unsubscribe(Unsubscribe { pkid: 2, topics: topics(1_000).skip(500).collect() }));
    assert!(matches!(raw.read(), Some(Packet::UnsubAck(_))));
    for many in [
        Packet::Unsubscribe(Unsubscribe { pkid: 2, topics: topics(52_000).collect() }),
        Packet::Subscribe(Subscribe { pkid: 2, ..subscribe(45_000) }),
    ] {
        let mut raw = join(&stack, "gw1", "gw1");
        raw.send(&many);
        assert_eq!(raw.read(), None);
    }
    let _ = join(&stack, "gw2", "gw2");
    stack.wait_until_ready();
}

/// Ends the background work, also when a test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends packets that cost the server more than the sender, over and over, like an attacker with a worker's password.
fn flood(stack: &Stack, over: &AtomicBool) {
    let say = |topic: &str, payload: &[u8], retain| {
        written(&Packet::Publish(Publish { retain, ..Publish::new(topic, QoS::AtMostOnce, payload) }))
    };
    let again =
        |filter: &str| written(&Packet::Subscribe(Subscribe { pkid: 1, ..Subscribe::new(filter, QoS::AtMostOnce) }));
    let mut setup = join(stack, "gw1", "gw1-setup");
    (0..2_000).for_each(|n| setup.send_bytes(&say(&format!("wireguard-worker/gw1/{n}/data"), b"{}", true)));
    let manners = [
        say("wgkex/worker/gw1/x", b"", false),
        say("wgkex/worker/gw1/applied", b"nonsense", false),
        written(&Packet::PingReq),
        again("wireguard-worker/+/+/data"),
        again("wireguard-worker/+/+/data"),
    ];
    thread::scope(|scope| {
        for (n, packet) in manners.into_iter().enumerate() {
            let mut raw = join(stack, "gw1", &format!("gw1-{n}"));
            let many = packet.repeat((64 << 10) / packet.len());
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    raw.send_if_taken(&many);
                    let _ = raw.has_ended();
                }
            });
        }
        // Another client that reconnects again and again, with a will each time.
        scope.spawn(move || {
            let login = Some(Login::new("gw1", "gw1"));
            let connect = Connect { login, ..connect_with_will("gw1-again", "wireguard-worker/gw1/status", "0") };
            while !over.load(Ordering::Relaxed) {
                let _ = RawClient::connect_tcp(stack.mqtt).log_in(&connect);
            }
        });
    });
}

/// Regression: the broker and gw2 were disconnected as too slow, and routers got 503.
#[test]
fn a_flooding_worker_slows_down_only_itself() {
    let plan = plan(&TWO, "").config("confirm_timeout: 20\nconfirm_budget: 20");
    let mut stack = Stack::start(plan);
    stack.plan.credentials = Some(("gw2".into(), "gw2".into()));
    let worker = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 3);
    stack.wait_for_gateways(1);
    let (over, begun) = (AtomicBool::new(false), Instant::now());
    thread::scope(|scope| {
        let _end = StopOnDrop(&over);
        scope.spawn(|| flood(&stack, &over));
        while slowed(&stack, "rate") < 100.0 && begun.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(5));
        }
        for n in 0..50 {
            let answer = stack.v2(DOMAIN, &key(n));
            assert_eq!((answer.status, answer.json()), (200, endpoint("gw2")), "key {n}");
        }
    });
    assert!(slowed(&stack, "rate") >= 100.0);
    assert_eq!(worker.probe.sessions(), 1, "gw2 stayed connected");
    let log = stack.broker().log();
    assert!(!log.contains(LOST), "{log}");
    let warnings = log.lines().filter(|line| line.contains("slowed down")).count();
    assert!((1..=2).contains(&warnings), "once a minute: {log}");
    stack.wait_until_ready();
}

/// Publishes `messages` as fast as it can, and waits until all are acknowledged.
fn publish_all(raw: &mut RawClient, messages: impl Iterator<Item = (String, Vec<u8>)>) {
    let publish = |(topic, payload)| Publish { pkid: 7, ..Publish::new(topic, QoS::AtLeastOnce, payload) };
    let (mut bytes, mut count) = (BytesMut::new(), 0);
    for message in messages {
        Packet::Publish(publish(message)).write(&mut bytes, usize::MAX).unwrap();
        count += 1;
    }
    thread::scope(|scope| {
        let mut sender = raw.try_clone();
        scope.spawn(move || sender.send_bytes(&bytes));
        (0..count).for_each(|n| assert!(matches!(raw.read(), Some(Packet::PubAck(_))), "message {n}"));
    });
}

/// Keys as from another broker, and a worker's confirmation of each, alone. Fails with a limit of 1,000 a second
/// without a burst, or if messages beyond the limit are dropped.
#[test]
fn a_normal_worker_is_never_slowed_down_and_acknowledged_messages_are_delivered() {
    const KEYS: u32 = 20_000;
    const MANY: u32 = 50_000;
    let stack = stack(&TWO);
    let (mut broker, mut worker) = (join(&stack, "b", "b"), join(&stack, "gw1", "gw1-applied"));
    publish_all(
        &mut broker,
        (0..KEYS).map(|n| key_for(DOMAIN, &key(n))).map(|message| (message.topic, message.payload)),
    );
    publish_all(
        &mut worker,
        (0..KEYS).map(|n| applied("gw1", DOMAIN, &key(n))).map(|message| (message.topic, message.payload)),
    );
    assert!(slowed(&stack, "rate") < 1.0, "{}", slowed(&stack, "rate"));

    let mut subscriber = join(&stack, "b", "subscriber");
    subscriber.subscribe(&[("wgkex/worker/gw1/x", QoS::AtLeastOnce)]);
    thread::scope(|scope| {
        scope
            .spawn(|| publish_all(&mut worker, (0..MANY).map(|n| ("wgkex/worker/gw1/x".into(), n.to_string().into()))));
        (0..MANY).for_each(|n| assert_eq!(subscriber.receive().payload, n.to_string()));
    });
}

/// A message of `size` bytes on a topic of the worker that only brokers subscribe to.
fn message_of(worker: &str, size: usize) -> BytesMut {
    written(&Packet::Publish(Publish::new(format!("wgkex/worker/{worker}/x"), QoS::AtMostOnce, vec![b'x'; size])))
}

/// Regression: the subscriber that reads slowly was disconnected, and sometimes those without messages.
#[test]
fn users_that_publish_much_at_once_end_no_subscriber_that_reads() {
    let users = [("gw1", "worker"), ("gw2", "worker"), ("gw3", "worker"), ("b", "broker")];
    let mut stack = stack(&users);
    let mut idle: Vec<_> = (0..20).map(|n| join(&stack, "gw1", &format!("gw1-idle-{n}"))).collect();
    for raw in &mut idle {
        raw.subscribe(&[("wireguard-worker/+/+/data", QoS::AtLeastOnce)]);
    }
    let mut slow = join(&stack, "b", "slow");
    slow.subscribe(&[("wgkex/worker/+/x", QoS::AtLeastOnce)]);
    let bursts = [("gw1", 12, 1_000_000), ("gw2", 4_000, 3_000), ("gw3", 10_000, 330)];
    thread::scope(|scope| {
        for (worker, count, size) in bursts {
            let mut raw = join(&stack, worker, worker);
            let burst = message_of(worker, size).repeat(count);
            // Waits until the server has read all.
            scope.spawn(move || {
                raw.send_bytes(&burst);
                ping(&mut raw);
            });
        }
        let mut unpaid = 0;
        for n in 0..bursts.iter().map(|(_, count, _)| count).sum() {
            let Some(Packet::Publish(publish)) = slow.read() else { panic!("the connection ended after {n} messages") };
            unpaid += publish.payload.len();
            // At most 8 MB a second.
            thread::sleep(Duration::from_millis(2) * u32::try_from(unpaid / (16 << 10)).unwrap());
            unpaid %= 16 << 10;
        }
    });
    assert!(slowed(&stack, "behind") > 0.0, "publishers waited");
    idle.iter_mut().for_each(ping);
    assert!(!stack.broker().log().contains(LOST), "{}", stack.broker().log());
    stack.wait_until_ready();
}

/// No publisher waits long for a client that does not read: that client misses messages, and is disconnected.
#[test]
fn a_subscriber_that_reads_nothing_blocks_no_publisher() {
    let users = [("gw1", "worker"), ("gw2", "worker"), ("gw3", "worker"), ("gw4", "worker"), ("b", "broker")];
    let mut stack = Stack::start(plan(&users, "").config("confirm_timeout: 20\nconfirm_budget: 20"));
    stack.plan.credentials = Some(("gw2".into(), "gw2".into()));
    let worker = Worker::start(&stack, "gw2", WorkerBehaviour::Confirms, 3);
    stack.wait_for_gateways(1);
    let mut deaf = join(&stack, "b", "deaf");
    deaf.subscribe(&[("wgkex/worker/+/x", QoS::AtLeastOnce)]);
    thread::scope(|scope| {
        for user in ["gw1", "gw3", "gw4"] {
            let mut raw = join(&stack, user, user);
            let burst = message_of(user, 3_000).repeat(5_000);
            scope.spawn(move || {
                raw.send_bytes(&burst);
                ping(&mut raw);
            });
        }
        for n in 0..20 {
            let answer = stack.v2(DOMAIN, &key(n));
            assert_eq!((answer.status, answer.json()), (200, endpoint("gw2")), "key {n}");
        }
    });
    deaf.wait_for_end();
    assert_eq!(worker.probe.sessions(), 1, "gw2 stayed connected");
    assert!(!stack.broker().log().contains(LOST), "{}", stack.broker().log());
    stack.wait_until_ready();
}

/// Without users any client may do everything, at any rate that the broker can process. Regression: its own connections
/// were ended as too slow.
#[test]
fn the_brokers_own_session_is_never_evicted() {
    let mut stack = Stack::start(Plan::new(Bus::Embedded));
    let many = written(&Packet::Publish(Publish::new("wgkex/worker/gw1/applied", QoS::AtMostOnce, vec![b'{'; 1_000])));
    let many = many.repeat(100);
    let begun = Instant::now();
    thread::scope(|scope| {
        for n in 0..4 {
            let mut raw = RawClient::connect(stack.mqtt, &format!("flood-{n}"));
            let many = &many;
            scope.spawn(move || {
                while begun.elapsed() < Duration::from_secs(3) {
                    raw.send_bytes(many);
                }
            });
        }
    });
    assert!(!stack.broker().log().contains(LOST), "{}", stack.broker().log());
    assert_serving(&mut stack);
}
