//! The connection to the broker of this machine: which address of its config is tried, and the text of an error.

use std::time::Duration;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use ureq::Agent;
use wgkex_common::Config;
use wgkex_common::config::Listen;
use wgkex_common::http::client::agent;

/// How long the broker may take to accept the connection, and for each part of its answer.
pub const BROKER_TIMEOUT: Duration = Duration::from_secs(15);
/// The largest answer, in bytes: larger ones are none of a broker's.
const ANSWER_MAX: u64 = 256 << 20;

/// A listener of the broker, to which calls are sent.
pub struct BrokerClient {
    agent: Agent,
    listen: Listen,
    /// The key of the config that names it.
    key: &'static str,
    /// The advice if there is no answer.
    hint: &'static str,
    authorization: Option<String>,
}

/// A call.
#[derive(Debug, Clone, Copy)]
pub struct BrokerCall<'a> {
    /// GET, POST or DELETE.
    pub method: &'a str,
    /// Path and query.
    pub path: &'a str,
    /// The body, for POST and DELETE.
    pub body: Option<&'a Value>,
}

impl<'a> BrokerCall<'a> {
    /// Requests `path`.
    #[must_use]
    pub fn get(path: &'a str) -> Self {
        Self { method: "GET", path, body: None }
    }

    /// Sends `body` to `path`.
    #[must_use]
    pub fn post(path: &'a str, body: &'a Value) -> Self {
        Self { method: "POST", path, body: Some(body) }
    }
}

impl BrokerClient {
    /// The listener for routers.
    #[must_use]
    pub fn for_anybody(config: &Config, timeout: Duration) -> Self {
        let (key, hint) = ("broker_listen", "is it running, and with this config?");
        Self { agent: agent(timeout), listen: config.broker_listen.clone(), key, hint, authorization: None }
    }

    /// The listener for admin calls.
    #[must_use]
    pub fn for_admin(config: &Config, token: &str, timeout: Duration) -> Self {
        let (key, hint) =
            ("admin_listen", "is it running, and was it started with this config and its admin_token_hash?");
        let authorization = Some(format!("Bearer {token}"));
        Self { agent: agent(timeout), listen: config.admin_listen.clone(), key, hint, authorization }
    }

    /// The listener for calls of the registry, with the login of this user.
    #[must_use]
    pub fn for_registry(config: &Config, user: &str, password: &str, timeout: Duration) -> Self {
        let credentials = STANDARD.encode(format!("{user}:{password}"));
        Self { authorization: Some(format!("Basic {credentials}")), ..Self::for_anybody(config, timeout) }
    }

    /// The address that is tried.
    #[must_use]
    pub fn address(&self) -> String {
        self.listen.reachable()
    }

    /// Sends one HTTP request and reads the answer, which has to be JSON, or empty for null; the error is the broker's,
    /// or describes the failure.
    pub fn send(&self, BrokerCall { method, path, body }: BrokerCall<'_>) -> anyhow::Result<Value> {
        let (address, key, hint) = (self.address(), self.key, self.hint);
        let url = format!("http://{address}{path}");
        let authorization = self.authorization.as_ref();
        let answer = match body {
            None => {
                let request = self.agent.get(url);
                match authorization {
                    Some(authorization) => request.header("Authorization", authorization),
                    None => request,
                }
                .call()
            }
            Some(body) => {
                let agent = &self.agent;
                let request = if method == "DELETE" { agent.delete(url).force_send_body() } else { agent.post(url) };
                let request = request.header("Content-Type", "application/json");
                let request = match authorization {
                    Some(authorization) => request.header("Authorization", authorization),
                    None => request,
                };
                request.send(body.to_string())
            }
        };
        let nobody = || format!("no broker answers on {address} ({key}): {hint}");
        let mut answer = answer.map_err(ureq::Error::into_io).with_context(nobody)?;
        let text = answer.body_mut().with_config().limit(ANSWER_MAX).read_to_string();
        let text = text.map_err(ureq::Error::into_io).with_context(nobody)?;
        let value: Value = if text.is_empty() { Ok(Value::Null) } else { serde_json::from_str(&text) }
            .with_context(|| format!("what {address} ({key}) answers is not JSON: is this the broker?"))?;
        match answer.status().as_u16() {
            200 | 201 => Ok(value),
            404 if value["error"]["message"] == "there is nothing here" => {
                bail!(
                    "the broker on {address} ({key}) does not know this call: it is of another version, or what it is for was enabled after its start: restart it"
                )
            }
            _ => bail!("{}", value["error"]["message"].as_str().unwrap_or("the broker refuses")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
    use std::thread;

    use serde_json::json;

    use super::*;

    fn config(listen: &str) -> Config {
        let yaml = format!("domains: [ff_a]\ndomain_prefixes: [ff_]\nadmin_listen: {listen}\nbroker_listen: {listen}");
        Config::parse("", &yaml, "h").unwrap()
    }

    /// The result of a call whose connection receives `answer`, and is then left open or closed.
    fn call(answer: &'static str, is_left_open: bool) -> Result<Value, String> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            is_left_open.then_some(stream)
        });
        let config = config(&format!("{{host: 0.0.0.0, port: {port}}}"));
        let client = BrokerClient::for_admin(&config, "t", Duration::from_millis(500));
        let result = client.send(BrokerCall { method: "DELETE", path: "/v1/lists/allow", body: Some(&json!({})) });
        drop(server.join());
        result.map_err(|error| format!("{error:#}").replace(&format!("127.0.0.1:{port}"), "HERE"))
    }

    #[test]
    fn an_answer_is_json_or_an_error_with_its_cause() {
        let ok = "HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n{\"done\":true}";
        assert_eq!(call(ok, true), Ok(json!({ "done": true })));
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nd\r\n{\"done\":true}\r\n0\r\n\r\n";
        assert_eq!(call(chunked, true), Ok(json!({ "done": true })));
        let refused = "HTTP/1.1 409 Conflict\r\nContent-Length: 27\r\n\r\n{\"error\":{\"message\":\"no.\"}}";
        assert_eq!(call(refused, false), Err("no.".into()));
        let older =
            "HTTP/1.1 404 Not Found\r\nContent-Length: 45\r\n\r\n{\"error\":{\"message\":\"there is nothing here\"}}";
        let other = "the broker on HERE (admin_listen) does not know this call: it is of another version, \
                     or what it is for was enabled after its start: restart it";
        assert_eq!(call(older, false), Err(other.into()));
        let nobody = "no broker answers on HERE (admin_listen): is it running, and was it started with this config and its \
                      admin_token_hash?: ";
        for (answer, is_left_open, starts) in [
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
                true,
                "what HERE (admin_listen) answers is not JSON: is this the broker?: ",
            ),
            ("", false, nobody),
            ("", true, &format!("{nobody}timeout")),
            ("SSH-2.0-x\r\n", true, nobody),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", false, nobody),
        ] {
            let error = call(answer, is_left_open).unwrap_err();
            assert!(error.starts_with(starts), "{answer}: {error}");
        }
    }

    #[test]
    fn a_refused_connection_names_the_address_and_its_key_of_the_config() {
        let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let config = config(&format!("{{host: \"::1\", port: {port}}}"));
        let error = |client: BrokerClient| format!("{:#}", client.send(BrokerCall::get("/")).unwrap_err());
        let expected = format!(
            "no broker answers on [::1]:{port} (broker_listen): is it running, and with this config?: Connection refused \
             (os error 111)"
        );
        assert_eq!(error(BrokerClient::for_anybody(&config, BROKER_TIMEOUT)), expected);
        let admin = error(BrokerClient::for_admin(&config, "t", BROKER_TIMEOUT));
        assert!(admin.starts_with(&format!("no broker answers on [::1]:{port} (admin_listen): ")), "{admin}");
        assert!(admin.contains("admin_token_hash") && !admin.contains("Bearer"), "{admin}");
    }
}
