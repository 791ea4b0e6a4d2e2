//! The differences between the brokers' clocks and this gateway's, by the hellos that the second session receives. No
//! task.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use tokio::sync::watch;
use tracing::{info, warn};
use wgkex_common::mqtt::Publish;
use wgkex_common::peer_clock::{Difference, PeerClock};
use wgkex_common::time_text::unix;
use wgkex_common::wire::message::Hello;
use wgkex_common::{BrokerName, Topic};

/// Brokers that are remembered at most: more than any fleet has.
const CLOCKS_MAX: usize = 256;

/// The brokers whose clock differs from this gateway's, by name.
pub type ClocksOff = BTreeMap<String, Difference>;

/// The clocks of all brokers.
#[derive(Debug, Default)]
pub struct BrokerClocks {
    known: BTreeMap<BrokerName, PeerClock>,
    off: watch::Sender<ClocksOff>,
    logged: BTreeSet<String>,
}

impl BrokerClocks {
    /// The clocks that differ.
    pub fn clocks_off(&self) -> watch::Receiver<ClocksOff> {
        self.off.subscribe()
    }

    /// Takes in a message, if it is a broker's hello that was not retained.
    pub fn on_message(&mut self, publish: &Publish) {
        if let Some(Topic::BrokerHello { broker }) = Topic::received(&publish.topic, publish.retain)
            && !publish.retain
        {
            self.on_hello(broker, Hello::sent(&publish.payload), unix(SystemTime::now()));
            self.log();
        }
    }

    /// The connection is lost: a broker may stop or restart unnoticed.
    pub fn on_down(&mut self) {
        self.known.clear();
        self.logged.clear();
        self.publish();
    }

    fn on_hello(&mut self, broker: BrokerName, sent: Option<u64>, now: u64) {
        match sent {
            None => {
                self.known.remove(&broker);
                self.logged.remove(broker.as_str());
            }
            Some(sent) if self.known.len() < CLOCKS_MAX || self.known.contains_key(&broker) => {
                self.known.entry(broker).or_default().on_hello(sent, now);
            }
            Some(_) => {}
        }
        self.publish();
    }

    fn publish(&self) {
        let off = |(broker, clock): (&BrokerName, &PeerClock)| Some((broker.as_str().to_owned(), clock.difference()?));
        self.off.send_replace(self.known.iter().filter_map(off).collect());
    }

    /// Logs one line when a clock begins to differ, and one when it no longer does.
    fn log(&mut self) {
        let off = self.off.borrow();
        for (broker, difference) in off.iter().filter(|(broker, _)| !self.logged.contains(*broker)) {
            warn!(%broker, "the broker's clock is {difference} this gateway's: one of the two is wrong");
        }
        for broker in self.logged.iter().filter(|broker| !off.contains_key(*broker)) {
            info!(%broker, "over: the broker's clock is this gateway's");
        }
        self.logged = off.keys().cloned().collect();
    }
}

#[cfg(test)]
mod tests {
    use wgkex_common::mqtt::QoS;

    use super::*;

    /// The differences after hellos that brokers sent so many seconds ahead of this clock.
    fn after(clocks: &mut BrokerClocks, hellos: &[(&str, i64)], retain: bool) -> Vec<String> {
        for (broker, ahead) in hellos {
            let sent = unix(SystemTime::now()).saturating_add_signed(*ahead);
            let payload = Hello::broker(Vec::new(), 1).payload(sent);
            let mut publish = Publish::new(format!("wgkex/broker/{broker}/hello"), QoS::AtMostOnce, payload);
            publish.retain = retain;
            clocks.on_message(&publish);
        }
        clocks.off.borrow().keys().cloned().collect()
    }

    #[test]
    fn only_live_hellos_count_and_only_while_the_broker_is_there() {
        let mut clocks = BrokerClocks::default();
        let off = [("b1", 3_600), ("b2", 0), ("b1", 3_660), ("b2", 30)];
        assert_eq!(after(&mut clocks, &off, true), [""; 0]);
        assert_eq!(after(&mut clocks, &off, false), ["b1"]);
        clocks.on_message(&Publish::new("wgkex/broker/b1/hello", QoS::AtMostOnce, ""));
        assert_eq!(after(&mut clocks, &[], false), [""; 0]);
        assert_eq!(after(&mut clocks, &off, false), ["b1"]);
        clocks.on_down();
        assert_eq!(after(&mut clocks, &[("b1", 3_600)], false), [""; 0]);
    }

    #[test]
    fn the_brokers_that_are_remembered_are_bounded() {
        let mut clocks = BrokerClocks::default();
        for n in 0..2 * CLOCKS_MAX {
            clocks.on_hello(n.to_string().parse().unwrap(), Some(0), 0);
        }
        assert_eq!(clocks.known.len(), CLOCKS_MAX);
    }
}
