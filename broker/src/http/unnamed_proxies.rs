//! The proxies that forward requests and are not in `trusted_proxies`. No IO.

use std::collections::BTreeSet;
use std::net::IpAddr;

use parking_lot::Mutex;

use crate::fleet::status::{Problem, ProblemKind};

/// The most proxies that are named: more of them have one cause.
const NAMED_PROXIES_MAX: usize = 8;

/// The addresses of proxies nearby that are not trusted, as far as they have forwarded requests.
#[derive(Debug, Default)]
pub struct UnnamedProxies(Mutex<BTreeSet<IpAddr>>);

impl UnnamedProxies {
    /// Records a proxy; true if it is to be named, as it was not so far.
    pub fn add(&self, proxy: IpAddr) -> bool {
        let mut known = self.0.lock();
        (known.len() < NAMED_PROXIES_MAX) && known.insert(proxy.to_canonical())
    }

    /// Whether there is any.
    pub fn is_any(&self) -> bool {
        !self.0.lock().is_empty()
    }

    /// A problem for each.
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |proxy: &IpAddr| Problem {
            kind: ProblemKind::ProxyNotTrusted,
            subject: proxy.to_string(),
            text: format!("proxy {proxy} is not in trusted_proxies: all routers behind it count as one client"),
        };
        self.0.lock().iter().map(problem).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_proxy_is_named_once_and_not_too_many() {
        let missed = UnnamedProxies::default();
        assert!(!missed.is_any());
        let proxy = |n: u8| IpAddr::from([10, 0, 0, n]);
        assert!(missed.add(proxy(1)) && !missed.add(proxy(1)) && missed.is_any());
        assert!(!missed.add("::ffff:10.0.0.1".parse().unwrap()));
        let named = (2..100).filter(|n| missed.add(proxy(*n))).count();
        assert_eq!((named, missed.problems().len()), (NAMED_PROXIES_MAX - 1, NAMED_PROXIES_MAX));
        let first = &missed.problems()[0];
        assert!(first.subject == "10.0.0.1" && first.text.starts_with("proxy 10.0.0.1 is not in trusted_proxies"));
    }
}
