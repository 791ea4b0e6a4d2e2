//! How often keys may come: `limits`.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::value::{Burst, Rate};

/// The rate limits for accepting keys; none means no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// The same key.
    pub per_key: Option<Quota>,
    /// Unknown keys from one address (IPv4) or network (IPv6, /56).
    pub per_client: Option<Quota>,
    /// Unknown keys of one domain.
    pub per_domain: Option<Quota>,
    /// Unknown keys in all.
    pub global: Option<Quota>,
}

/// A token bucket: a burst, and a rate per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quota {
    /// The size of the burst; at most 1000000.
    pub burst: NonZeroU32,
    /// The rate at which it refills, per second; 0.001 to 1000000.
    pub per_second: f64,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawLimits {
    pub per_key: RawLimit,
    pub per_client: RawLimit,
    pub per_domain: RawLimit,
    pub global: RawLimit,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default)]
pub(super) struct RawLimit {
    pub burst: Option<Burst>,
    pub per_second: Option<Rate>,
}

impl RawLimits {
    /// Generous for a single client, which may be a proxy of thousands of routers, since a refused router retries only
    /// after a minute; a flood is bounded by the overall limit.
    pub fn check(&self) -> Limits {
        Limits {
            per_key: self.per_key.check(10, 1.0),
            per_client: self.per_client.check(1_000, 20.0),
            per_domain: self.per_domain.check(25_000, 250.0),
            global: self.global.check(50_000, 500.0),
        }
    }
}

impl RawLimit {
    fn check(&self, burst: u32, per_second: f64) -> Option<Quota> {
        let burst = self.burst.as_ref().map_or(burst, |burst| burst.0);
        let per_second = self.per_second.as_ref().map_or(per_second, |rate| rate.0);
        NonZeroU32::new(burst).map(|burst| Quota { burst, per_second })
    }
}
