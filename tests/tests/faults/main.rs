//! Faults of the field, injected into the real programs. Each test ends with the kernels of the gateways equal to the
//! reference: every key that got a 200 is there with all its objects, and none that was never requested.

#![expect(clippy::unwrap_used, reason = "a test fails by it")]

mod brokers;
mod bus;
mod clock;
mod disk;
mod kernel;
mod lab;
mod lists;
mod live_keys;
mod random;
mod slow_kernel;
mod workers;

macro_rules! lane {
    ($name:ident, $lane:ident, $why:literal: $($file:ident::$scenario:ident),* $(,)?) => {
        mod $name {
            $(#[test]
            #[ignore = $why]
            fn $scenario() {
                crate::$file::$scenario(wgkex_tests::gateway::Lane::$lane);
            })*
        }
    };
}

lane! { netns, Userspace, "needs root: tests/run netns":
    brokers::a_broker_killed_between_publish_and_answer_leaves_nothing_half_done,
    brokers::a_broker_killed_while_writing_still_has_keys_accepted_a_second_before,
    brokers::brokers_that_forgot_everything_know_again_what_routers_send,
    brokers::either_of_two_brokers_may_die,
    bus::a_connection_that_drops_messages_silently_delivers_keys_late,
    bus::a_slow_connection_delivers_every_key,
    bus::an_mqtt_server_frozen_for_half_a_minute_causes_no_wrong_answer,
    bus::an_mqtt_server_stopped_for_half_a_minute_causes_no_wrong_answer,
    bus::an_mqtt_server_killed_without_persistence_loses_no_key,
    disk::an_unfinished_last_write_is_logged,
    disk::damaged_state_is_quarantined_and_stops_no_start,
    disk::with_a_full_disk_both_serve_and_they_write_when_there_is_room,
    disk::with_a_read_only_disk_both_serve_and_they_write_when_they_may,
    kernel::a_worker_that_missed_netlink_events_notices_and_catches_up,
    kernel::interfaces_deleted_and_made_again_in_the_middle_of_a_storm_lose_no_key,
    kernel::lost_objects_are_restored_orphans_removed_and_foreign_ones_kept,
    lists::a_gateway_obeys_the_lists_of_its_own_machine,
    lists::a_gateway_that_was_away_removes_keys_revoked_meanwhile,
    lists::a_revoked_key_is_gone_from_every_gateway_in_two_seconds_and_stays_away,
    lists::separated_brokers_converge_on_the_same_revocations,
    random::a_hundred_random_faults_lose_no_key_and_leak_nothing,
    workers::a_rebooted_gateway_is_full_again_from_the_broker_or_from_its_own_disk,
    workers::a_worker_killed_in_the_middle_of_a_batch_goes_on,
    workers::a_worker_that_finds_an_intact_kernel_touches_nothing,
}

// Tests that depend on the kernel's own WireGuard, or step its clock.
lane! { vm, Kernel, "needs WireGuard in the kernel: tests/run vm":
    clock::a_clock_that_is_stepped_costs_no_peer_and_no_key,
    kernel::interfaces_deleted_and_made_again_in_the_middle_of_a_storm_lose_no_key,
    lists::a_revoked_key_is_gone_from_every_gateway_in_two_seconds_and_stays_away,
    workers::a_rebooted_gateway_is_full_again_from_the_broker_or_from_its_own_disk,
}
