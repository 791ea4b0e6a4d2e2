//! The filters that a client subscribed to, as a tree of their levels: the cost to look up a topic depends on its
//! levels, and not on how many filters there are. Every message is looked up for every client.

use rumqttc::QoS;

use crate::mqtt_server::log::LogPosition;

/// The most levels of a filter.
pub const LEVELS_MAX: usize = 64;

/// A subscription that was granted to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrantedSubscription {
    /// The quality of service.
    pub qos: QoS,
    /// It has the messages that are published from this position on.
    pub since: LogPosition,
}

/// A client's filters, each with its granted subscription.
#[derive(Debug, Default)]
pub struct ClientSubscriptions {
    root: Node,
    len: usize,
}

#[derive(Debug, Default)]
struct Node {
    /// The filter that ends here.
    granted: Option<GrantedSubscription>,
    /// The next levels, in order.
    below: Vec<(Box<str>, Node)>,
}

impl ClientSubscriptions {
    /// How many filters there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether this very filter is there.
    pub fn contains(&self, filter: &str) -> bool {
        let end = filter.split('/').try_fold(&self.root, Node::at);
        end.is_some_and(|node| node.granted.is_some())
    }

    /// Adds a filter, or grants it another quality; then no message in between is missed.
    pub fn insert(&mut self, filter: &str, subscription: GrantedSubscription) {
        let node = filter.split('/').fold(&mut self.root, Node::at_or_new);
        let since = node.granted.map_or(subscription.since, |before| before.since.min(subscription.since));
        self.len += usize::from(node.granted.replace(GrantedSubscription { since, ..subscription }).is_none());
    }

    /// Takes a filter away, if it is there.
    pub fn remove(&mut self, filter: &str) {
        self.len -= usize::from(self.root.remove(filter.split('/')));
    }

    /// The highest quality of all filters that have `topic`, since the first of them; none if none has it.
    pub fn granted(&self, topic: &str) -> Option<GrantedSubscription> {
        // A wildcard at the beginning has no topic that begins with `$`.
        self.root.granted(topic.split('/'), !topic.starts_with('$'))
    }
}

impl Node {
    fn place(&self, level: &str) -> Result<usize, usize> {
        self.below.binary_search_by(|(other, _)| (**other).cmp(level))
    }

    fn at(&self, level: &str) -> Option<&Self> {
        self.place(level).ok().map(|place| &self.below[place].1)
    }

    fn at_or_new(&mut self, level: &str) -> &mut Self {
        let place = self.place(level).unwrap_or_else(|place| {
            self.below.insert(place, (level.into(), Self::default()));
            place
        });
        &mut self.below[place].1
    }

    /// Whether a filter ended there. Levels that lead nowhere any more go, too.
    fn remove<'a>(&mut self, mut levels: impl Iterator<Item = &'a str>) -> bool {
        let Some(level) = levels.next() else { return self.granted.take().is_some() };
        let Ok(place) = self.place(level) else { return false };
        let next = &mut self.below[place].1;
        let was_there = next.remove(levels);
        if next.granted.is_none() && next.below.is_empty() {
            self.below.remove(place);
        }
        was_there
    }

    fn granted<'a>(
        &self,
        mut levels: impl Iterator<Item = &'a str> + Clone,
        wildcards: bool,
    ) -> Option<GrantedSubscription> {
        let all = if wildcards { self.at("#").and_then(|node| node.granted) } else { None };
        let Some(level) = levels.next() else {
            // `a/#` has `a`, too.
            return both(self.granted, all);
        };
        let any = if wildcards { self.at("+").and_then(|node| node.granted(levels.clone(), true)) } else { None };
        let this = self.at(level).and_then(|node| node.granted(levels, true));
        both(all, both(any, this))
    }
}

fn both(one: Option<GrantedSubscription>, other: Option<GrantedSubscription>) -> Option<GrantedSubscription> {
    match (one, other) {
        (Some(one), Some(other)) => Some(GrantedSubscription {
            qos: if other.qos > one.qos { other.qos } else { one.qos },
            since: one.since.min(other.since),
        }),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::mqtt_server::filter::{is_filter, matches};

    const SUBSCRIPTION: GrantedSubscription = GrantedSubscription { qos: QoS::AtMostOnce, since: LogPosition::new(0) };

    proptest! {
        #[test]
        fn a_topic_has_the_highest_quality_of_the_matching_filters(
            steps in prop::collection::vec(("[ab+$](/[ab+]?){0,3}(/#)?|#", 0..2u8, 0..9u64, any::<bool>()), 0..20),
            topics in prop::collection::vec("[ab$](/[ab]?){0,4}", 1..10),
        ) {
            let (mut tree, mut list) = (ClientSubscriptions::default(), BTreeMap::new());
            for (filter, level, since, comes) in steps {
                prop_assume!(is_filter(&filter));
                let (qos, since) = (rumqttc::qos(level).unwrap(), LogPosition::new(since));
                if comes {
                    tree.insert(&filter, GrantedSubscription { qos, since });
                    let (to_qos, earliest) = list.entry(filter).or_insert((qos, since));
                    (*to_qos, *earliest) = (qos, since.min(*earliest));
                } else {
                    tree.remove(&filter);
                    list.remove(&filter);
                }
                prop_assert_eq!(tree.len(), list.len());
            }
            prop_assert!(list.keys().all(|filter| tree.contains(filter)) && !tree.contains("a/x"));
            for topic in topics {
                let fitting = || list.iter().filter(|(filter, _)| matches(filter, &topic)).map(|(_, granted)| *granted);
                let since = fitting().map(|(_, since)| since).min();
                let qos = if fitting().any(|(qos, _)| qos == QoS::AtLeastOnce) { QoS::AtLeastOnce } else { QoS::AtMostOnce };
                let expected = since.map(|since| GrantedSubscription { qos, since });
                prop_assert_eq!(tree.granted(&topic), expected, "{} in {:?}", topic, list);
            }
        }
    }

    #[test]
    fn removed_subscriptions_take_no_memory() {
        let mut tree = ClientSubscriptions::default();
        let filters = ["a/b/c/d", "a/b", "a/+/#", "#"];
        for filter in filters {
            tree.insert(filter, SUBSCRIPTION);
        }
        for filter in filters {
            tree.remove(filter);
        }
        tree.remove("a/b");
        assert!(tree.len() == 0 && tree.root.below.is_empty());
    }

    /// A list of filters compared with each topic takes more than ten seconds.
    #[test]
    fn a_thousand_filters_are_not_all_looked_at() {
        let mut tree = ClientSubscriptions::default();
        (0..1_000).for_each(|n| tree.insert(&format!("wireguard/+/{n}"), SUBSCRIPTION));
        let begun = std::time::Instant::now();
        for n in 0..300_000 {
            assert_eq!(tree.granted("wireguard/ffx_a/all"), None, "{n}");
        }
        // A few hundred nanoseconds each; a list takes a hundred times as long.
        assert!(begun.elapsed() < std::time::Duration::from_secs(10));
    }
}
