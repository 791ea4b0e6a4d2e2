//! Who may say and hear what on the bus. One table, for the embedded MQTT server and for the access lists of others.

use std::fmt::Write as _;

use wgkex_common::config::Role;

use crate::mqtt_server::filter::{covers, matches};

/// What is done with a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// To publish on it.
    Say,
    /// To subscribe to it.
    Hear,
}

impl Verb {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Say, Self::Hear];

    /// What MQTT calls it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Say => "publish",
            Self::Hear => "subscribe",
        }
    }
}

/// Stands for the user's name in [`TABLE`].
const NAME: &str = "%u";

/// What each role may do. A worker says what is its own, and what it asks brokers; keys it only hears.
const TABLE: [(Role, Verb, &str); 37] = [
    (Role::Worker, Verb::Say, "wireguard-metrics/+/%u/connected_peers"),
    (Role::Worker, Verb::Say, "wireguard-worker/%u/status"),
    (Role::Worker, Verb::Say, "wireguard-worker/%u/+/data"),
    (Role::Worker, Verb::Say, "wgkex/worker/%u/+"),
    (Role::Worker, Verb::Say, "wgkex/broker/+/questions"),
    (Role::Worker, Verb::Say, "parker/wireguard-metrics/%u/connected_peers"),
    (Role::Worker, Verb::Say, "parker/wireguard-worker/%u/status"),
    (Role::Worker, Verb::Say, "parker/wireguard-worker/%u/data"),
    (Role::Worker, Verb::Hear, "parker/wireguard/+"),
    (Role::Worker, Verb::Hear, "parker/wireguard-worker/+/data"),
    (Role::Worker, Verb::Hear, "parker/wireguard-broker/+/status"),
    (Role::Worker, Verb::Hear, "wireguard/+/+"),
    (Role::Worker, Verb::Hear, "wireguard-worker/+/status"),
    (Role::Worker, Verb::Hear, "wireguard-worker/+/+/data"),
    (Role::Worker, Verb::Hear, "wireguard-broker/+/status"),
    (Role::Worker, Verb::Hear, "wgkex/broker/+/hello"),
    (Role::Worker, Verb::Hear, "wgkex/worker/%u/pages"),
    (Role::Worker, Verb::Hear, "wgkex/worker/%u/hello"),
    (Role::Worker, Verb::Hear, "wgkex/worker/%u/echo"),
    (Role::Worker, Verb::Hear, "wireguard-metrics/+/%u/connected_peers"),
    (Role::Worker, Verb::Hear, "wgkex/revocations"),
    (Role::Broker, Verb::Say, "wireguard/+/+"),
    (Role::Broker, Verb::Say, "wireguard-broker/+/status"),
    (Role::Broker, Verb::Say, "wgkex/broker/+/hello"),
    (Role::Broker, Verb::Say, "wgkex/broker/+/questions"),
    (Role::Broker, Verb::Say, "wgkex/broker/+/pages"),
    (Role::Broker, Verb::Say, "wgkex/broker/+/echo"),
    (Role::Broker, Verb::Say, "wgkex/worker/+/pages"),
    (Role::Broker, Verb::Say, "wgkex/revocations"),
    (Role::Broker, Verb::Say, "parker/wireguard/+"),
    (Role::Broker, Verb::Say, "parker/wireguard-broker/+/status"),
    (Role::Broker, Verb::Hear, "parker/#"),
    (Role::Broker, Verb::Hear, "wireguard/#"),
    (Role::Broker, Verb::Hear, "wireguard-metrics/#"),
    (Role::Broker, Verb::Hear, "wireguard-worker/#"),
    (Role::Broker, Verb::Hear, "wireguard-broker/#"),
    (Role::Broker, Verb::Hear, "wgkex/#"),
];

/// What one user may say and hear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Access {
    say: Vec<String>,
    hear: Vec<String>,
}

impl Access {
    /// What everybody may where there are no users: all but what begins with `$`.
    pub fn everything() -> Self {
        Self { say: vec!["#".into()], hear: vec!["#".into()] }
    }

    /// What the user `name` may.
    pub fn of(role: Role, name: &str) -> Self {
        Self { say: filters(role, Verb::Say, name), hear: filters(role, Verb::Hear, name) }
    }

    /// Whether a message on `topic` may be published.
    pub fn may_say(&self, topic: &str) -> bool {
        self.say.iter().any(|filter| matches(filter, topic))
    }

    /// Whether `filter` may be subscribed to: only if all that it could bring may be heard.
    pub fn may_hear(&self, filter: &str) -> bool {
        self.hear.iter().any(|allowed| covers(allowed, filter))
    }
}

fn filters(role: Role, verb: Verb, name: &str) -> Vec<String> {
    let rows = TABLE.iter().filter(|row| (row.0, row.1) == (role, verb));
    rows.map(|(_, _, filter)| filter.replace(NAME, name)).collect()
}

/// Mosquitto's `acl_file` for these users.
pub fn mosquitto<'a>(users: impl Iterator<Item = (&'a str, Role)>) -> String {
    let mut text = String::from("# Made by wgkex-broker mqtt-acl. For mosquitto.conf: acl_file FILE\n");
    for (name, role) in users {
        let _ = write!(text, "\nuser {name}\n");
        for (verb, word) in [(Verb::Say, "write"), (Verb::Hear, "read")] {
            for filter in filters(role, verb, name) {
                let _ = writeln!(text, "topic {word} {filter}");
            }
        }
    }
    text
}

/// EMQX's `acl.conf` for these users.
pub fn emqx<'a>(users: impl Iterator<Item = (&'a str, Role)>) -> String {
    let mut text =
        String::from("%% Made by wgkex-broker mqtt-acl. For EMQX: the file of the authorization source \"file\".\n");
    for (name, role) in users {
        for verb in Verb::ALL {
            let (word, filters) = (verb.word(), filters(role, verb, name));
            let _ = writeln!(text, "{{allow, {{user, {name:?}}}, {word}, {filters:?}}}.");
        }
    }
    text.push_str("{deny, all}.\n");
    text
}

#[cfg(test)]
mod tests {
    use wgkex_common::Topic;

    use super::*;

    fn worker() -> Access {
        Access::of(Role::Worker, "gw1")
    }

    fn broker() -> Access {
        Access::of(Role::Broker, "wgkex")
    }

    /// Every topic there is, those of the worker `worker` and the broker `broker`; whether the worker gw1 and a broker
    /// may say it, and whether they may hear it.
    fn table(worker: &str) -> Vec<(Topic, [bool; 4])> {
        let (own, name) = (worker == "gw1", || worker.to_owned());
        let (domain, broker) = (|| "ffx_a".to_owned(), || "b1".to_owned());
        vec![
            (Topic::Key { domain: domain() }, [false, true, true, true]),
            (Topic::ConnectedPeers { domain: domain(), worker: name() }, [own, false, own, true]),
            (Topic::WorkerStatus { worker: name() }, [own, false, true, true]),
            (Topic::WorkerData { worker: name(), domain: domain() }, [own, false, true, true]),
            (Topic::BrokerStatus { broker: broker() }, [false, true, true, true]),
            (Topic::Hello { worker: name() }, [own, false, own, true]),
            (Topic::WorkerEcho { worker: name() }, [own, false, own, true]),
            (Topic::BrokerEcho { broker: broker() }, [false, true, false, true]),
            (Topic::Applied { worker: name() }, [own, false, false, true]),
            (Topic::Seen { worker: name() }, [own, false, false, true]),
            (Topic::WorkerQuestions { worker: name() }, [own, false, false, true]),
            (Topic::WorkerPages { worker: name() }, [own, true, own, true]),
            (Topic::BrokerHello { broker: broker() }, [false, true, true, true]),
            (Topic::Questions { broker: broker() }, [true, true, false, true]),
            (Topic::BrokerPages { broker: broker() }, [false, true, false, true]),
        ]
    }

    #[test]
    fn each_says_its_own_and_a_worker_no_keys_and_nothing_of_another() {
        for name in ["gw1", "gw2", "gw1x"] {
            for (topic, expected) in table(name) {
                let topic = topic.to_string();
                let found = [
                    worker().may_say(&topic),
                    broker().may_say(&topic),
                    worker().may_hear(&topic),
                    broker().may_hear(&topic),
                ];
                assert_eq!(found, expected, "{topic}");
            }
        }
    }

    #[test]
    fn the_programs_filters_may_be_heard_and_wider_ones_not() {
        let pages = Topic::WorkerPages { worker: "gw1".into() }.to_string();
        for filter in [Topic::keys("ffx_a"), Topic::broker_hellos(), pages, "wireguard-worker/+/+/data".into()] {
            assert!(worker().may_hear(&filter), "{filter}");
        }
        for filter in ["#", "wireguard/#", "wgkex/#", "wgkex/worker/+/pages", "wireguard-metrics/+/+/connected_peers"] {
            assert!(!worker().may_hear(filter), "{filter}");
        }
        let states = Topic::states();
        let own = [Topic::applied(), Topic::seen(), Topic::broker_hellos(), Topic::keys("ffx_a")];
        for filter in states.iter().chain(&own) {
            assert!(broker().may_hear(filter), "{filter}");
        }
        assert!(!broker().may_hear("#") && !broker().may_hear("$SYS/#"));
    }

    #[test]
    fn nobody_says_what_is_the_servers() {
        for access in [worker(), broker(), Access::everything()] {
            assert!(!access.may_say("$SYS/broker/version") && !access.may_hear("$SYS/#"));
        }
    }

    #[test]
    fn the_lists_of_other_servers_have_the_same_rows() {
        let users = || [("gw1", Role::Worker), ("wgkex", Role::Broker)].into_iter();
        let list = mosquitto(users());
        let of_worker = list.split("\nuser ").find(|part| part.starts_with("gw1\n")).unwrap();
        assert!(of_worker.contains("\ntopic write wireguard-metrics/+/gw1/connected_peers\n"), "{list}");
        assert!(
            of_worker.contains("\ntopic read wireguard/+/+\n") && !of_worker.contains("write wireguard/"),
            "{list}"
        );
        assert_eq!(list.lines().filter(|line| line.starts_with("topic ")).count(), TABLE.len());
        let list = emqx(users());
        assert!(
            list.contains(r#"{allow, {user, "gw1"}, publish, ["wireguard-metrics/+/gw1/connected_peers", "#),
            "{list}"
        );
        assert!(list.ends_with("{deny, all}.\n"), "{list}");
    }
}
