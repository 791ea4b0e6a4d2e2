//! Which broker of the bus has the registry. All have the one in a common database; a SQLite file is one broker's, so that a second one
//! refuses: agents that ask it would take an empty list for the truth. It refuses until it is started again, also while the
//! first one is away.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::error;
use wgkex_common::wire::message::Served;
use wgkex_common::{BrokerName, Config};

use crate::bus::election;

/// What all brokers with a SQLite file have in common.
const RULES: &str = "sqlite";
/// A registry without servers comes after all that have some.
const EMPTY: u64 = 1 << 52;
/// Brokers that are remembered at most: more than any bus has.
const BROKERS_MAX: usize = 256;

/// Whether this broker may serve its registry. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Holder(Option<Arc<Mutex<State>>>);

#[derive(Debug)]
struct State {
    own: BrokerName,
    served: Served,
    others: BTreeMap<BrokerName, Other>,
    /// The broker that has the registry instead.
    holder: Option<BrokerName>,
}

#[derive(Debug, Default)]
struct Other {
    is_online: bool,
    served: Option<Served>,
}

impl Holder {
    /// Of a broker that has just started. There is nothing to be decided without a registry, or with a common database.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        if config.registry.is_none() || config.storage.url.is_some() {
            return Self(None);
        }
        let served = Served { since: election::since(), rules: RULES.into() };
        let own = BrokerName::from(&config.name);
        Self(Some(Arc::new(Mutex::new(State { own, served, others: BTreeMap::new(), holder: None }))))
    }

    /// Whether only one broker can have it.
    #[must_use]
    pub fn is_of_one(&self) -> bool {
        self.0.is_some()
    }

    /// This broker's registry has no server: one that has some comes first.
    pub fn set_empty(&self) {
        if let Some(state) = &self.0 {
            state.lock().served.since += EMPTY;
        }
    }

    /// What others are told; nothing where this broker refuses.
    #[must_use]
    pub fn served(&self) -> Option<Served> {
        let state = self.0.as_ref()?.lock();
        state.holder.is_none().then(|| state.served.clone())
    }

    /// A broker is online, or no longer.
    pub fn on_status(&self, broker: &BrokerName, is_online: bool) {
        self.change(broker, |other| other.is_online = is_online);
    }

    /// A broker has a registry for itself, or no longer.
    pub fn on_hello(&self, broker: &BrokerName, served: Option<Served>) {
        self.change(broker, |other| other.served = served);
    }

    /// The broker that has the registry instead of this one.
    #[must_use]
    pub fn other(&self) -> Option<BrokerName> {
        self.0.as_ref()?.lock().holder.clone()
    }

    fn change(&self, broker: &BrokerName, change: impl FnOnce(&mut Other)) {
        let Some(mut state) = self.0.as_ref().map(|state| state.lock()) else { return };
        let has_room = state.others.len() < BROKERS_MAX || state.others.contains_key(broker);
        if *broker != state.own && has_room {
            change(state.others.entry(broker.clone()).or_default());
            state.update();
        }
    }
}

impl State {
    fn update(&mut self) {
        let own = (self.served.since, &self.own);
        let comes_first = |(name, other): (&BrokerName, &Other)| {
            let served = other.served.as_ref().filter(|served| other.is_online && served.rules == RULES)?;
            ((served.since, name) < own).then(|| name.clone())
        };
        let first = self.others.iter().find_map(comes_first);
        if let Some(broker) = first.filter(|_| self.holder.is_none()) {
            error!(
                broker = broker.as_str(),
                "another broker of this bus has a registry, and with SQLite only one can have it: this one refuses its calls \
                 until it is started again; give both the same PostgreSQL by storage, or disable one of them"
            );
            self.holder = Some(broker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_one_with_servers_serves_and_one_that_refuses_does_so_until_its_restart() {
        let yaml = "domains: [ff_a]\ndomain_prefixes: [ff_]\nregistry: {enabled: true, password_file: /p}\n";
        let holder = |yaml: &str| Holder::new(&Config::parse("", yaml, "b").unwrap());
        let (name, other) =
            (|name: &str| name.parse::<BrokerName>().unwrap(), |since| Served { since, rules: RULES.into() });
        let (first, refused) = (holder(yaml), holder(yaml));
        let late = first.served().unwrap().since + 1;
        for (broker, since) in [("a", late), ("c", EMPTY + 1), ("b", 0)] {
            first.on_hello(&name(broker), Some(other(since)));
            first.on_status(&name(broker), true);
        }
        assert_eq!((first.other(), first.served().is_some()), (None, true));
        refused.on_hello(&name("a"), Some(other(1)));
        assert_eq!(refused.other(), None, "it is not online");
        refused.on_status(&name("a"), true);
        refused.on_status(&name("a"), false);
        assert_eq!((refused.other(), refused.served()), (Some(name("a")), None));
        let empty = holder(yaml);
        empty.set_empty();
        empty.on_status(&name("z"), true);
        empty.on_hello(&name("z"), Some(other(late)));
        assert_eq!(empty.other(), Some(name("z")));
        let shared = holder(&format!("{yaml}storage: postgres://u@h/d\n"));
        shared.on_status(&name("a"), true);
        shared.on_hello(&name("a"), Some(other(0)));
        assert_eq!((shared.other(), shared.served(), shared.is_of_one()), (None, None, false));
    }
}
