//! The MQTT server inside the broker: rumqttd, on a thread of its own, on loopback.

use std::net::SocketAddr;
use std::thread;

use anyhow::anyhow;
use rumqttd::protocol::v4::V4;
use rumqttd::{ConnectionSettings, LinkType, Router, RouterConfig, Server, ServerSettings};
use tokio::runtime;
use tokio::sync::oneshot;

/// Room for every gateway of the largest fleet; rumqttd does not survive one client too many.
const CONNECTIONS: usize = 10_010;
/// A packet of the bus is a few hundred bytes; the longest, 2,000 confirmations, has 100 kB.
const PACKET_MAX: usize = 1 << 20;
/// Retained messages beyond this are cut off silently, so it is beyond any number of them.
const PACKETS_AT_ONCE: u64 = 1_000_000;
/// Messages of a filter are kept in segments until these are full, read or not.
const SEGMENT: usize = 1 << 20;
/// How many segments a filter has: 4 MiB hold 20,000 keys several times.
const SEGMENTS: usize = 4;

/// Serves until it fails; the error says why, as when the port is taken.
pub async fn serve(listen: SocketAddr) -> anyhow::Error {
    let (ended, end) = oneshot::channel();
    let server = thread::Builder::new().name("mqtt".into()).spawn(move || {
        // The one who waits for it may have gone first.
        let _ = ended.send(serve_blocking(listen));
    });
    if let Err(error) = server {
        return anyhow!(error).context("the thread of the embedded MQTT server does not start");
    }
    let error = match end.await {
        Ok(Err(error)) => error,
        Ok(Ok(())) | Err(_) => anyhow!("ended"),
    };
    error.context(format!("mqtt_listen {listen}: the embedded MQTT server does not serve"))
}

fn serve_blocking(listen: SocketAddr) -> anyhow::Result<()> {
    let router = Router::new(0, router()).spawn();
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    runtime
        .block_on(Server::new(server(listen), router, V4).start(LinkType::Remote))
        .map_err(|error| anyhow!("{error}"))
}

fn router() -> RouterConfig {
    RouterConfig {
        max_connections: CONNECTIONS,
        max_outgoing_packet_count: PACKETS_AT_ONCE,
        max_segment_size: SEGMENT,
        max_segment_count: SEGMENTS,
        ..RouterConfig::default()
    }
}

fn server(listen: SocketAddr) -> ServerSettings {
    ServerSettings {
        name: "wgkex".into(),
        listen,
        tls: None,
        next_connection_delay_ms: 1,
        connections: ConnectionSettings {
            connection_timeout_ms: 5_000,
            max_payload_size: PACKET_MAX,
            max_inflight_count: 500,
            auth: None,
            external_auth: None,
            dynamic_filters: true,
        },
    }
}
