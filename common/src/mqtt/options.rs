//! From our config to rumqttc's options; nothing else of the program sees rumqttc's builder.

use std::sync::Arc;

use rumqttc::{LastWill, MqttOptions, NetworkOptions, TlsConfiguration, Transport};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::{Client, INFLIGHT, Message};
use crate::config::{Mqtt, Server};

/// The largest packet there is (MQTT 3.1.1 section 2.2.3). A lower limit would turn one large retained message of a
/// stranger into a loop of reconnects.
const PACKET_MAX: usize = 268_435_455;
/// Seconds to wait for a connection, and for one write to it.
const CONNECT_SECONDS: u64 = 5;

/// The roots of the system cannot be used for TLS.
#[derive(Debug, thiserror::Error)]
#[error("mqtt.tls: {0}")]
pub struct TlsError(String);

/// The options, and the server's name for the log.
pub(super) fn options(config: &Mqtt, client: &Client) -> Result<(MqttOptions, NetworkOptions, String), TlsError> {
    let (host, port) = match &config.server {
        Server::Embedded(address) => (address.ip().to_string(), address.port()),
        Server::External { host, port } => (host.clone(), *port),
    };
    let mut options = MqttOptions::new(&client.id, &host, port);
    options
        .set_clean_session(true)
        .set_keep_alive(config.keepalive)
        .set_inflight(INFLIGHT)
        .set_max_packet_size(PACKET_MAX, PACKET_MAX);
    if let Some(Message { topic, payload, qos, retain }) = &client.will {
        options.set_last_will(LastWill::new(topic.to_string(), payload.clone(), *qos, *retain));
    }
    if let Some(credentials) = &config.credentials {
        options.set_credentials(&credentials.username, credentials.password.expose());
    }
    if config.tls {
        options.set_transport(Transport::Tls(TlsConfiguration::Rustls(Arc::new(system_roots()?))));
    }
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    network.set_connection_timeout(CONNECT_SECONDS);
    Ok((options, network, format!("{host}:{port}")))
}

fn system_roots() -> Result<ClientConfig, TlsError> {
    let mut roots = RootCertStore::empty();
    let (usable, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if usable == 0 {
        return Err(TlsError("no usable root certificate on this system; install ca-certificates".into()));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(error.to_string()))?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
