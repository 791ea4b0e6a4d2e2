//! The task that answers sync requests: the live keys that a gateway or another broker lacks, chunk by chunk.
//!
//! The previous stop of a request is [`requesters`](super::requesters), the next one of its chunk the client that requested
//! it.

use std::time::Instant;

use wgkex_common::mqtt::{Message, MqttHandle, PublishError};

use crate::bus::metrics::Metrics;
use crate::bus::sync_queue::SyncQueue;
use crate::fleet::Fleet;

/// Answers one request after the other, until the session ends: so never more than one chunk is queued before new keys.
pub async fn run(bus: MqttHandle, fleet: Fleet, requests: SyncQueue, metrics: Metrics) {
    loop {
        let (requester, request) = requests.next().await;
        let begun = Instant::now();
        let chunk = fleet.live().chunk(&request, begun);
        let took = begun.elapsed();
        metrics.keys_given.inc_by(chunk.keys.len() as u64);
        let payload = serde_json::to_vec(&chunk).unwrap_or_default();
        requests.on_answered(requester, took, payload.len());
        if bus.publish(Message::transient(request.from.chunks(), payload)).await == Err(PublishError::SessionEnded) {
            return;
        }
    }
}
