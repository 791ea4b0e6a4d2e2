//! Makes rumqttc's options from our config; rumqttc's builder is used nowhere else.

use std::path::Path;
use std::sync::Arc;

use rumqttc::{LastWill, MqttOptions, NetworkOptions, TlsConfiguration, Transport};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::{INFLIGHT, Message, SessionConfig};
use crate::config::{Mqtt, MqttAddress, Tls};
use crate::tls::{TlsError, certificates, private_key, provider};

/// The largest packet (MQTT 3.1.1 section 2.2.3). A lower limit would make one large retained message of another
/// program a loop of reconnects.
const PROTOCOL_PACKET_MAX: usize = 268_435_455;
/// Seconds to wait for a connection, and for one write to it.
const CONNECT_SECONDS: u64 = 5;

/// The options, and the server's name for the log.
pub(super) fn options(
    config: &Mqtt,
    client: &SessionConfig,
) -> Result<(MqttOptions, NetworkOptions, String), TlsError> {
    let (host, port) = match &config.server {
        MqttAddress::Embedded(address) | MqttAddress::Own(address) => (address.ip().to_string(), address.port()),
        MqttAddress::External { host, port } => (host.clone(), *port),
    };
    let mut options = MqttOptions::new(&client.id, &host, port);
    options
        .set_clean_session(true)
        .set_keep_alive(config.keepalive)
        .set_inflight(INFLIGHT)
        .set_max_packet_size(PROTOCOL_PACKET_MAX, PROTOCOL_PACKET_MAX);
    if let Some(Message { topic, payload, qos, retain }) = &client.will {
        options.set_last_will(LastWill::new(topic.to_string(), payload.clone(), *qos, *retain));
    }
    if let Some(credentials) = &config.credentials {
        options.set_credentials(&credentials.username, credentials.password.expose());
    }
    if let Some(tls) = &config.tls {
        options.set_transport(Transport::Tls(TlsConfiguration::Rustls(Arc::new(client_config(tls)?))));
    }
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    network.set_connection_timeout(CONNECT_SECONDS);
    let name = match &config.server {
        MqttAddress::Own(_) => "the broker's own".to_owned(),
        MqttAddress::Embedded(address) => address.to_string(),
        MqttAddress::External { host, port } if host.contains(':') => format!("[{host}]:{port}"),
        MqttAddress::External { host, port } => format!("{host}:{port}"),
    };
    Ok((options, network, name))
}

fn client_config(tls: &Tls) -> Result<ClientConfig, TlsError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsError(format!("mqtt.tls: {error}")))?
        .with_root_certificates(roots(tls.ca_file.as_deref())?);
    let Some((certificate_file, key_file)) = &tls.own else { return Ok(config.with_no_client_auth()) };
    let chain = certificates("mqtt.cert_file", certificate_file)?;
    let key = private_key("mqtt.key_file", key_file)?;
    config.with_client_auth_cert(chain, key).map_err(|error| TlsError::in_file("mqtt.key_file", key_file, &error))
}

fn roots(ca_file: Option<&Path>) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    let Some(file) = ca_file else {
        let (usable, _) = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if usable == 0 {
            let lack =
                "no usable root certificate on this system: install ca-certificates, or name a file in mqtt.ca_file";
            return Err(TlsError(format!("mqtt.tls: {lack}")));
        }
        return Ok(roots);
    };
    for certificate in certificates("mqtt.ca_file", file)? {
        roots.add(certificate).map_err(|error| TlsError::in_file("mqtt.ca_file", file, &error))?;
    }
    Ok(roots)
}
