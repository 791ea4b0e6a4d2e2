use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use super::*;
use crate::Config;

/// A server that answers no ping, and sends messages all the time if it is `talkative`, until its client disconnects.
fn start_deaf_server(talkative: bool) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut packet = [0; 512];
        let _connect = client.read(&mut packet).unwrap();
        client.write_all(&[0x20, 2, 0, 0]).unwrap();
        let _subscribe = client.read(&mut packet).unwrap();
        client.write_all(&[0x90, 3, packet[2], packet[3], 0]).unwrap();
        let publish = [0x30, 4, 0, 1, b'a', b'x'];
        while client.write_all(if talkative { &publish } else { &[] }).is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
    });
    port
}

/// How often the connection to such a server was lost after some keep-alives.
async fn losses(talkative: bool) -> usize {
    let port = start_deaf_server(talkative);
    let yaml = format!(
        "domains: [ff_a]\ndomain_prefixes: [ff_]\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}, keepalive: 1}}"
    );
    let config = Config::parse("", &yaml, "w").unwrap();
    let client = SessionConfig { qos0_filters: vec!["a".into()], ..SessionConfig::secondary("w".into()) };
    let (_bus, session) = open(&config.mqtt, client).unwrap();
    let (lost, counted) = mpsc::unbounded_channel();
    let on_event = move |event| {
        if matches!(event, Event::Down) {
            lost.send(()).unwrap();
        }
    };
    session.run(on_event, sleep(Duration::from_secs(5))).await;
    counted.len()
}

/// A server that delivers a message, grants a subscription and closes the connection, all at once; then it accepts the
/// client again, and answers no more.
fn start_leaving_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut packet = [0; 512];
        let (mut client, _) = listener.accept().unwrap();
        let _connect = client.read(&mut packet).unwrap();
        client.write_all(&[0x20, 2, 0, 0]).unwrap();
        let _subscribe = client.read(&mut packet).unwrap();
        let (publish, granted) = ([0x30, 4, 0, 1, b'a', b'x'], [0x90, 3, packet[2], packet[3], 0]);
        // There is no packet of type 0: the client closes the connection after it.
        client.write_all(&[&publish[..], &granted, &[0, 0]].concat()).unwrap();
        let (mut again, _) = listener.accept().unwrap();
        let _connect = again.read(&mut packet).unwrap();
        again.write_all(&[0x20, 2, 0, 0]).unwrap();
        while again.read(&mut packet).is_ok_and(|length| length > 0) {}
    });
    port
}

/// rumqttc keeps what it has read when a connection breaks, and returns it on the next one.
#[tokio::test]
async fn packets_read_before_a_disconnect_are_handed_on_and_do_not_count_for_the_next_connection() {
    let port = start_leaving_server();
    let yaml = format!("domains: [ff_a]\ndomain_prefixes: [ff_]\nmqtt: {{broker_url: 127.0.0.1, broker_port: {port}}}");
    let config = Config::parse("", &yaml, "w").unwrap();
    let client = SessionConfig { qos0_filters: vec!["a".into()], ..SessionConfig::secondary("w".into()) };
    let (_bus, session) = open(&config.mqtt, client).unwrap();
    let (events, mut handed_on) = mpsc::unbounded_channel();
    let on_event = move |event| {
        let _ = events.send(match event {
            Event::Up => "up",
            Event::Down => "down",
            Event::Message(_) => "message",
        });
    };
    session.run(on_event, sleep(Duration::from_secs(2))).await;
    let mut all = Vec::new();
    while let Ok(event) = handed_on.try_recv() {
        all.push(event);
    }
    assert_eq!(all, ["message", "down"]);
}

#[tokio::test]
async fn a_server_that_sends_messages_is_not_dead_although_its_pongs_are_late() {
    let (talkative, silent) = tokio::join!(losses(true), losses(false));
    assert_eq!((talkative, silent > 0), (0, true), "{silent}");
}
